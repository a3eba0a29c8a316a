"""The command line: the demos' last line, tables and JSON, errors as one line, interrupts."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from peft import PeftConfig

from tickwork import cli_clients
from tickwork.cli import main
from tickwork.recipes import clients, rl, sft
from tickwork.recipes.tasks import NEW_TASKS

TICKWORK = [sys.executable, "-m", "tickwork.cli"]


def run(*arguments: str, text: str | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, arguments, input=text)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store with what a short demo saved, and the demo's last line."""
    store = tmp_path_factory.mktemp("store")
    command = [*TICKWORK, "demo", "--steps", "12", "--store", str(store)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return store, json.loads(answer.stdout.splitlines()[-1])


def test_the_demo_learns_and_ends_with_one_json_object(demo: tuple[Path, dict[str, Any]]) -> None:
    """The last line holds the promised figures; a dozen steps already lower the loss by far."""
    store, result = demo

    assert set(result) >= {"loss_before", "loss_after", "exact_match_before", "exact_match_after", "seconds"}
    assert result["loss_after"] < 0.5 * result["loss_before"]
    assert result["exact_match_before"] <= 0.05
    assert result["tokens_per_second"] > 0
    assert result["checkpoint"].startswith("tinker://")
    assert (Path(result["folder"]) / "adapter_model.safetensors").is_file()
    assert Path(result["folder"]).is_relative_to(store)


def test_runs_and_checkpoints_are_listed_as_table_and_as_json(demo: tuple[Path, dict[str, Any]]) -> None:
    """The JSON is whole; the table shows the whole path, folded if need be."""
    store, result = demo
    runs = json.loads(run("runs", "--store", str(store), "--json").stdout)
    listed = json.loads(run("checkpoints", "list", "--store", str(store), "--json").stdout)
    table = run("checkpoints", "list", "--store", str(store)).stdout

    assert runs[0]["training_run_id"] in result["checkpoint"]
    assert [each["tinker_path"] for each in listed] == [result["checkpoint"]]
    assert "training" in table
    assert json.loads(run("checkpoints", "list", "--run", "nobody", "--store", str(store), "--json").stdout) == []


def test_info_tells_where_a_checkpoint_lies(demo: tuple[Path, dict[str, Any]]) -> None:
    """Steps, rank and folder of a checkpoint are at hand."""
    store, result = demo
    meta = json.loads(run("checkpoints", "info", result["checkpoint"], "--store", str(store), "--json").stdout)

    assert (meta["steps"], meta["lora"]["rank"], meta["folder"]) == (12, 16, result["folder"])
    assert "lora" in run("checkpoints", "info", result["checkpoint"], "--store", str(store)).stdout


def test_export_writes_what_peft_reads_and_nothing_is_overwritten(
    demo: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """An exported folder has PEFT's configuration; a second export to it is refused."""
    store, result = demo
    target = tmp_path / "adapter"
    first, second = (
        run("checkpoints", "export", result["checkpoint"], str(target), "--store", str(store)) for _ in "12"
    )

    assert first.exit_code == 0
    assert PeftConfig.from_pretrained(str(target)).r == 16
    assert second.exit_code == 1
    assert "exists" in second.output


def test_delete_asks_and_deletes(tmp_path: Path, demo: tuple[Path, dict[str, Any]]) -> None:
    """No is no; yes deletes; what is gone is an error that names it."""
    from tickwork import ServiceClient

    with ServiceClient(store=tmp_path) as service:
        path = service.create_lora_training_client("tickwork/tiny", rank=1, seed=0).save_state("x").result(60).path
    refused = run("checkpoints", "delete", path, "--store", str(tmp_path), text="n\n")
    kept = json.loads(run("checkpoints", "list", "--store", str(tmp_path), "--json").stdout)
    done = run("checkpoints", "delete", path, "-y", "--store", str(tmp_path))
    again = run("checkpoints", "delete", path, "-y", "--store", str(tmp_path))

    assert (refused.exit_code, len(kept), done.exit_code, again.exit_code) == (1, 1, 0, 1)
    assert f"there is no checkpoint {path}" in again.output


def test_models_lists_what_is_shipped() -> None:
    """The shipped model stands in the table and in the JSON."""
    assert "tickwork/tiny" in run("models").stdout
    assert json.loads(run("models", "--json").stdout)[0]["max_context_length"] == 512


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["checkpoints", "info", "tinker://a/b/c"], "is not of the form"),
        (["checkpoints", "info", "tinker://a/weights/c"], "there is no checkpoint"),
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "clients", "--steps", "0"], "--steps"),
        (["train"], "No such command"),
    ],
)
def test_errors_are_one_line_and_a_status(tmp_path: Path, arguments: list[str], said: str) -> None:
    """Wrong input ends with a message and without a traceback."""
    result = run(*arguments, *(["--store", str(tmp_path)] if arguments[0] == "checkpoints" else []))

    assert result.exit_code in (1, 2)
    assert said in result.output
    assert "Traceback" not in result.output


def test_an_empty_store_is_an_empty_list(tmp_path: Path) -> None:
    """Listing a store that was never written is no error, and makes no folder."""
    assert json.loads(run("runs", "--store", str(tmp_path / "none"), "--json").stdout) == []
    assert not (tmp_path / "none").exists()


def test_control_c_ends_the_demo_soon_and_quietly(tmp_path: Path) -> None:
    """An interrupt ends the current pass, then the process, with a status and without a traceback."""
    command = [*TICKWORK, "demo", "--steps", "100000", "--store", str(tmp_path)]
    # A shell that has put the tests into the background has them, and what they start, ignore an interrupt.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        signal.signal(signal.SIGINT, before)
        try:
            while not list(tmp_path.glob("runs/*/run.json")):
                assert process.poll() is None
                os.sched_yield()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()

    assert process.returncode == 1
    assert "Traceback" not in errors


def test_rl_settings_and_datums_cover_exactly_the_drawn_tokens() -> None:
    """The advantage lies on the drawn tokens, and the logprobs are those they were drawn with."""
    from tickwork import SampledSequence

    sequence = SampledSequence("stop", [5, 6, 257], [-0.5, -0.25, -0.125])
    datum = rl.rl_datum([1, 2, 3], sequence, 2.0)

    assert datum.model_input.to_ints() == [1, 2, 3, 5, 6]
    assert datum.loss_fn_inputs["target_tokens"].data == [2, 3, 5, 6, 257]
    assert datum.loss_fn_inputs["advantages"].data == [0, 0, 2, 2, 2]
    assert datum.loss_fn_inputs["logprobs"].data == [0, 0, -0.5, -0.25, -0.125]


def test_groups_of_equal_reward_teach_nothing() -> None:
    """Without a spread of rewards there is no advantage, and no datum."""
    from tickwork import SampledSequence

    sequences = [SampledSequence("stop", [5], [-1.0]), SampledSequence("stop", [6], [-1.0])]

    assert rl.Group([1, 2], sequences, [1.0, 1.0]).data() == []
    assert [d.loss_fn_inputs["advantages"].data[-1] for d in rl.Group([1, 2], sequences, [1.0, 0.0]).data()] == [1, -1]


def test_the_focal_loss_is_what_it_says() -> None:
    """The custom loss of the demo weighs a token by 1 - p."""
    import torch

    from tickwork import Datum, ModelInput

    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 0.0]})
    logp = torch.log(torch.tensor([0.25, 0.5])).requires_grad_()
    loss, metrics = sft.focal_loss([datum], [logp])

    assert float(loss.detach()) == pytest.approx(-0.75 * float(logp[0].detach()))
    assert metrics == {"datums:sum": 1.0}


def test_serve_takes_the_switches_of_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--no-merge`` and ``--invariant`` become settings; without them passes are merged."""
    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(
        "tickwork.cli_server.trio.run", lambda _, settings: seen.append((settings.merge, settings.invariant))
    )
    monkeypatch.setattr("tickwork.cli_server.sys.setswitchinterval", lambda _: None)
    forms: list[str] = []
    monkeypatch.setattr("tickwork.server.logs.configure", forms.append)
    for flags in ((), ("--no-merge",), ("--invariant",)):
        assert run("serve", "--model", "tickwork/tiny", *flags).exit_code == 0
    assert seen == [(True, False), (False, False), (True, True)]
    assert run("serve", "--model", "tickwork/tiny", "--log", "json").exit_code == 0
    assert forms == ["text"] * 3 + ["json"]


def test_four_clients_learn_at_once_and_then_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client trains on its own rows in shared passes, to the loss that it reaches alone; the last line is JSON."""
    small = {"batch": 4, "held_out": 3}
    monkeypatch.setattr(cli_clients, "Settings", lambda **given: clients.Settings(**given, **small))
    answer = run("demo", "clients", "--steps", "3", "--seed", "1")
    result = json.loads(answer.stdout.splitlines()[-1])
    last = {line.split(": ")[0]: line for line in answer.stderr.splitlines() if "step 3/3" in line}
    together, alone = (
        [float(re.findall(r"loss (\S+)", last[f"{phase}  {task}"])[0]) for task in clients.RANKS]
        for phase in ("together", "alone")
    )

    assert answer.exit_code == 0, answer.output
    assert set(result["tasks"]) == set(clients.RANKS) == set(NEW_TASKS)
    assert together == pytest.approx(alone, abs=0.002)
    assert len({*together}) == 4
    assert result["worse"] == []
    assert result["lanes_per_pass"] > 1
    assert min(result["seconds_together"], result["seconds_alone"], result["tokens_per_second"]) > 0
    assert "exact match, pig latin" in answer.stderr


def test_who_is_worse_together_by_more_than_the_margin_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss within the margin is let pass; a greater one is named and ends the demo with 1."""
    tasks = {
        "lost": clients.TaskResult(0.0, 0.9, 0.96),
        "within": clients.TaskResult(0.0, 0.9, 0.94),
        "unknown": clients.TaskResult(0.0, 0.0, None),
    }
    result = clients.Result(tasks, clients.worse(tasks), clients.MARGIN, 1.0, 2.0, 3.0, 4.0)

    async def learn(*_: object) -> clients.Result:
        return result

    monkeypatch.setattr(cli_clients, "learn", learn)
    answer = run("demo", "clients")

    assert answer.exit_code == 1
    assert json.loads(answer.stdout.splitlines()[-1])["worse"] == ["lost"]
    assert [row.style for row in cli_clients.summary(result).rows][:3] == ["bold red", "", ""]


def test_new_tasks_are_what_they_say() -> None:
    """One word under each."""
    assert {task: make("stone") for task, make in NEW_TASKS.items()} == {
        "pig latin": "onestay",
        "shout backwards": "ENOTS",
        "hide vowels": "st*n*",
        "spell loud": "S-T-O-N-E",
    }


def test_the_live_view_shows_each_lane_since_the_phase_began() -> None:
    """Waits are means, the device's share is of its busy seconds, counters are of this phase alone."""
    from types import SimpleNamespace

    from rich.console import Console

    from tickwork.engine.statistics import EngineStatistics, LaneStatistics

    def engine(cycles: int, busy: float, lane: LaneStatistics) -> EngineStatistics:
        return EngineStatistics(cycles, cycles, 100 * cycles, 0, busy, 2.0 * cycles, 0, 0, 0, 0, 0, {"id": lane})

    begun = engine(10, 5.0, LaneStatistics(6, 4, 8, 600, 1.0, 1.0, None))
    now = engine(30, 9.0, LaneStatistics(16, 14, 28, 1600, 5.0, 2.0, "submit ahead"))
    client: Any = SimpleNamespace(model_id="id")
    learner = clients.Learner("pig latin", client, [], clients.Settings(), 7, 0.5, 40, 0.25)
    progress = clients.Progress("together", learner, [learner], begun, now)
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(cli_clients.view(progress))
    shown = console.export_text()

    assert "together: 20 cycles, 20 passes, 50 tokens/s, 2.00 lanes per pass" in shown
    assert cli_clients.lane_cells(progress, learner) == [
        *("pig latin", "7/60", "0.500", "1,000", "10", "10", "200.0", "25%", "0.25", "submit ahead"),
    ]
