"""``tickwork conformance``: all green on ours; red on a server that does one thing wrong, at that thing."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import wrong_server
from served import KEY, TINY
from tickwork.cli import main
from tickwork.conformance import BAD, Verdict, probes, run


def test_ours_is_all_green(tmp_path, monkeypatch):
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    file = tmp_path / "report.json"
    done = CliRunner().invoke(main, ["conformance", "--json", str(file)])
    assert done.exit_code == 0, done.output
    report = json.loads(file.read_text())
    assert report["bad"] == 0
    verdicts = {finding["name"]: finding["verdict"] for finding in report["findings"]}
    assert len(verdicts) == len(probes()) > 55
    assert set(verdicts.values()) == {"PASS"}


@pytest.mark.parametrize("fault", wrong_server.FAULTS)
def test_a_wrong_server_is_found_out(server_url, fault, monkeypatch):
    verdict, red = wrong_server.FAULTS[fault]
    wrong_server.put(fault, monkeypatch)
    findings = {finding.name: finding for finding in run(server_url, KEY, TINY, only=sorted(red))}
    assert set(findings) == red
    for finding in findings.values():
        assert finding.verdict in BAD, finding
    assert verdict in {finding.verdict for finding in findings.values()}


def test_a_fault_does_not_redden_the_rest(server_url, monkeypatch):
    wrong_server.put("no_weight_decay", monkeypatch)
    others = ["beta1", "eps", "learning_rate", "grad_clip_norm", "weight_decay"]
    findings = run(server_url, KEY, TINY, only=others)
    assert {finding.name for finding in findings if finding.verdict in BAD} == {"weight_decay"}


def test_every_probe_that_asks_for_an_option_has_a_fault():
    faulted = set().union(*(red for _, red in wrong_server.FAULTS.values()))
    options = {probe.name for probe in probes() if probe.group in ("optimizer", "adapters", "losses")}
    harmless = {
        *("parameters_out_of_range_are_refused", "unknown_base_models_are_refused", "a_fresh_adapter_changes_nothing"),
        *("importance_sampling", "custom_loss_of_the_client", "custom_loss_of_the_server"),
    }
    assert options - faulted == harmless


def test_a_server_that_is_not_there_is_broken():
    findings = run("http://127.0.0.1:9", KEY, TINY, only=["unknown_keys_are_refused"], seconds=1)
    assert findings[0].verdict is Verdict.BROKEN


def test_an_unknown_probe_is_told():
    done = CliRunner().invoke(main, ["conformance", "--only", "nothing"])
    assert done.exit_code == 1
    assert "nothing" in done.output
