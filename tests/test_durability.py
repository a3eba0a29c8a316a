"""What survives the end of a server, however it comes: the official SDK trains on while it is killed beneath it."""

from __future__ import annotations

import random
import time

import pytest
from tinker import types

from journals import change
from killing import Nurse, hurry, killed, script, serving_from, several, undisturbed
from nursing import POINTS
from served import TINY, Raw, datum, sdk
from tickwork.errors import JournalError
from tickwork.journal.report import report
from tickwork.models import locate
from tickwork.server import Settings, serve, serving

pytestmark = [
    pytest.mark.filterwarnings("ignore::tinker.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning"),
]
ADAM = types.AdamParams(learning_rate=1e-2)
PROMPT = types.ModelInput.from_ints([3, 14, 15])
LONG = types.SamplingParams(max_tokens=40, seed=5, stop=[])
ROUNDS = 60


@pytest.fixture(scope="module")
def nurse(tmp_path_factory):
    found = Nurse(tmp_path_factory.mktemp("servers") / "log")
    yield found
    found.close()


@pytest.fixture
def impatient(monkeypatch):
    hurry(monkeypatch)


def test_what_was_accepted_runs_exactly_once_whenever_the_server_is_killed(tmp_path, nurse, impatient):
    """Killed 33 times, everything the client was told and every checkpoint is bit by bit that of a run left alone."""
    ends = [*[None] * 25, *[(point, random.Random(point).randrange(4)) for point in POINTS]]
    random.Random(0).shuffle(ends)
    told, files = undisturbed(nurse.at(tmp_path / "calm"), script, ROUNDS)
    again, same, count = killed(nurse.at(tmp_path / "killed", snapshot_seconds=0.1), script, ROUNDS, ends)
    assert again == told
    assert same == files
    assert len(files) > 10
    assert count == 33


def test_several_models_and_samplers_that_follow_them_go_on_to_the_same_bits(tmp_path, nurse, impatient):
    """On an invariant server, killed a few times, beside each other as alone."""
    apart = {"invariant": True, "snapshot_seconds": 0.1}
    ends = [None, ("snapshot-rename", 1), None, None, ("commit", 4), None]
    told, files = undisturbed(nurse.at(tmp_path / "calm", **apart), several, 12)
    again, same, count = killed(nurse.at(tmp_path / "killed", **apart), several, 12, ends)
    assert again == told
    assert same == files
    assert (len(files), count) == (6, 6)


def steps(raw, model, numbers):
    """Ask for steps of different lengths; return the ids."""
    return [raw.optim(model, number, learning_rate=10.0**-number).json()["request_id"] for number in numbers]


def test_early_requests_and_given_up_numbers_are_remembered(tmp_path, nurse):
    nurse.at(tmp_path, gap_seconds=2)
    with serving_from(nurse) as url, Raw(url) as raw:
        model, waits = raw.model(), raw.model()
        (given_up,) = steps(raw, model, [2])
        assert "metrics" in raw.result(given_up)
        (early,) = steps(raw, waits, [3])
    with serving_from(nurse) as url, Raw(url) as raw:
        assert "metrics" in raw.result(given_up)
        assert "given up" in raw.result(raw.optim(model, 1).json()["request_id"])["error"]
        assert [raw.result(name)["type"] for name in [*steps(raw, waits, [1, 2]), early]] == ["optim_step"] * 3


def test_samplers_and_unfinished_samples_are_there_again(tmp_path, nurse):
    """A snapshot stays what it was though its model was trained on, and a sample is drawn again from its seed."""
    nurse.at(tmp_path)
    params = types.SamplingParams(max_tokens=100, seed=5, stop=[])
    with sdk_of(nurse) as service, serving_from(nurse):
        client = service().create_lora_training_client(TINY, rank=4, seed=1).result(60)
        train(client)
        sampler = client.save_weights_and_get_sampling_client().result()
        wanted = sampler.sample(PROMPT, 1, params).result(60)
        train(client)
        unfinished = sampler.sample(PROMPT, 1, params)
        time.sleep(0.1)
        nurse.kill()
        nurse.start()
        nurse.up()
        for again in (unfinished.result(60), sampler.sample(PROMPT, 1, params).result(60)):
            assert again.sequences[0].tokens == wanted.sequences[0].tokens
            assert again.sequences[0].logprobs == wanted.sequences[0].logprobs


def test_a_sampler_that_follows_its_model_stays_where_it_was_led(tmp_path, nurse):
    """Also by one that was let go since, to make room; one of its samples is in flight at the end."""
    nurse.at(tmp_path, snapshot_seconds=1000, max_samplers=2)
    with sdk_of(nurse) as service, serving_from(nurse):
        client = service().create_lora_training_client(TINY, rank=4, seed=1).result(60)
        follows = client.save_weights_and_get_sampling_client(kind="inflight").result(60)
        first = drawn(follows)
        train(client)
        client.save_weights_and_get_sampling_client(kind="inflight").result(60)
        wanted = drawn(follows)
        assert wanted != first
        drawn(service().create_sampling_client(base_model=TINY).result(60))
        train(client)
        unfinished = follows.sample(PROMPT, 1, LONG)
        time.sleep(0.05)
        nurse.kill()
        nurse.start()
        nurse.up()
        assert drawn(follows, unfinished) == wanted  # one after the other: beside each other they would round otherwise
        assert drawn(follows) == wanted


def test_with_power_what_was_accepted_is_done_after_a_kill(tmp_path, nurse):
    """Each commit is synced before it is answered; what was answered, and not done, is done by the next server."""
    nurse.at(tmp_path, journal="power")
    with serving_from(nurse) as url, Raw(url) as raw:
        model = raw.model()
        asked = [raw.forward_backward(model, 1, [datum([1] * 400)] * 8).json(), raw.optim(model, 2).json()]
        nurse.kill()
        nurse.start()
        nurse.up()
        passed, stepped = (raw.result(each["request_id"]) for each in asked)
        assert passed["metrics"]["loss:sum"] > 0
        assert stepped["metrics"]["optim/step"] == 1


def test_a_model_whose_base_is_not_served_fails_by_name_and_comes_back_with_it(tmp_path, nurse):
    """Beside another, which goes on."""
    both = [f"one={locate(TINY)}", f"other={locate(TINY)}"]
    nurse.at(tmp_path, models=both)
    with serving_from(nurse) as url, Raw(url) as raw:
        session = raw.session()
        gone, stays = (raw.model(session, number, base=base) for number, base in enumerate(("one", "other")))
        assert [stepped(raw, model, 1) for model in (gone, stays)] == [1, 1]
        nurse.kill()
        nurse.settings["models"] = both[1:]
        nurse.start()
        nurse.up()
        lost = [raw.optim(gone, number).json()["request_id"] for number in (3, 4)]
        why = raw.result(lost[0])["error"]
        assert "its base model 'one' is not served any more: start the server with --model one" in why
        assert stepped(raw, stays, 2) == 2
        nurse.kill()
        nurse.settings["models"] = both
        nurse.start()
        nurse.up()
        assert [raw.result(name)["error"] for name in lost] == [why, why]
        assert [stepped(raw, model, 3) for model in (gone, stays)] == [2, 3]


def stepped(raw, model, number):
    """Take an optimizer step, with a gradient; return how many that makes."""
    raw.result(raw.forward_backward(model, 2 * number - 1, [datum()]).json()["request_id"])
    return raw.result(raw.optim(model, 2 * number).json()["request_id"])["metrics"]["optim/step"]


def test_what_was_loaded_outlives_its_checkpoint(tmp_path, nurse):
    nurse.at(tmp_path, snapshot_seconds=1000)
    with sdk_of(nurse) as service, serving_from(nurse):
        client = service().create_lora_training_client(TINY, rank=4, seed=1).result(60)
        train(client)
        path = client.save_state("first").result(60).path
        other = service().create_training_client_from_state_with_optimizer(path).result(60)
        wanted = logprobs(other)
        train(other)
        other.load_state_with_optimizer(path).result(60)
        service().create_rest_client().delete_checkpoint_from_tinker_path(path).result(60)
        nurse.kill()
        nurse.start()
        nurse.up()
        assert logprobs(other) == wanted


def test_a_stopped_server_goes_on_where_it_was_and_a_failed_request_stays_failed(tmp_path, nurse):
    nurse.at(tmp_path, snapshot_seconds=1000)
    with sdk_of(nurse) as service, serving_from(nurse):
        client = service().create_lora_training_client(TINY, rank=4, seed=1).result(60)
        train(client)
        bad = client.forward_backward([datum([1, 2, 10**6])], "cross_entropy")
        with pytest.raises(Exception, match="token"):
            bad.result(60)
        train(client)
        wanted = logprobs(client)
        assert nurse.stop() == "ended 0"
        assert list((tmp_path / "journal" / "snapshots").iterdir())
        nurse.start()
        nurse.up()
        assert logprobs(client) == wanted


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_damaged_snapshot_is_computed_again_or_its_model_refused_by_name(tmp_path, nurse, trimmed):
    nurse.at(tmp_path)
    with serving_from(nurse) as url, Raw(url) as raw:
        model = raw.model()
        for number in (1, 2):
            raw.result(raw.optim(model, number).json()["request_id"])
        assert nurse.stop() == "ended 0"
        (file,) = (tmp_path / "journal" / "snapshots").iterdir()
        file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
        if trimmed:
            change(tmp_path, "DELETE FROM requests")
        nurse.start()
        nurse.up()
        answer = raw.result(raw.optim(model, 3).json()["request_id"])
        assert "damaged" in answer["error"] if trimmed else "metrics" in answer
        assert raw.model()


def test_who_looks_on_is_told_what_came_back(tmp_path, nurse):
    """Before the next start, beside the server that has brought its models back, and where one's base model is gone."""
    nurse.at(tmp_path, snapshot_seconds=1000)
    with serving_from(nurse) as url, Raw(url) as raw:
        model = raw.model()
        for number in (1, 2):
            raw.result(raw.forward_backward(model, 2 * number - 1, [datum()]).json()["request_id"])
            raw.result(raw.optim(model, 2 * number).json()["request_id"])
        early = raw.optim(model, 6).json()["request_id"]
        beside = report(tmp_path)
        nurse.kill()
        after = report(tmp_path)
        assert (beside.holder, after.holder) == (str(nurse.pid), None)
        assert beside.lanes == after.lanes
        told = after.lanes[model]
        assert (told.accepted, told.recorded, told.again, told.back) == (6, 5, 5, None)
        nurse.start()
        nurse.up()
        raw.result(raw.optim(model, 5).json()["request_id"])
        raw.result(early)
        told = report(tmp_path).lanes[model]
        assert (told.accepted, told.back, told.ran_again, told.broken) == (7, 4, 5, None)
        nurse.kill()
        nurse.settings["models"] = [f"another={locate(TINY)}"]
        nurse.start()
        nurse.up()
        assert "is not served any more" in raw.result(raw.optim(model, 7).json()["request_id"])["error"]
        assert f"its base model {TINY!r} is not served any more" in report(tmp_path).lanes[model].broken


def test_two_servers_do_not_share_a_store(tmp_path):
    settings = Settings(models=(TINY,), store=tmp_path, port=0)
    with serving(settings), pytest.raises(JournalError, match="in use by process"), serving(settings):
        pass


def test_a_journal_that_can_not_be_written_is_named(tmp_path):
    """Where its folder should be there is a file: the server does not start, unless it may go on in memory."""
    (tmp_path / "journal").touch()
    settings = {"models": (TINY,), "store": tmp_path, "port": 0}
    with pytest.raises(JournalError, match="needs a folder it can write"), serving(Settings(**settings)):
        pass
    with serving(Settings(**settings, journal_optional=True)) as url, Raw(url) as raw:
        raw.model()


@pytest.mark.parametrize("optional", [False, True])
def test_a_full_disk_is_named_and_nothing_acknowledged_is_lost(tmp_path, monkeypatch, optional):
    journals = []
    real = serve.Journal
    monkeypatch.setattr(serve, "Journal", lambda *a, **k: journals.append(real(*a, **k)) or journals[-1])
    settings = Settings(models=(TINY,), store=tmp_path, port=0, poll_seconds=0.1, journal_optional=optional)
    with serving(settings) as url, Raw(url) as raw:
        model = raw.model()
        first = raw.optim(model, 1).json()["request_id"]
        raw.result(first)
        fill(journals[0])
        answers = [raw.forward_backward(model, number, [datum([1] * 400)] * 30) for number in range(2, 6)]
        taken = sum(answer.status_code == 200 for answer in answers)
        if optional:
            assert [answer.status_code for answer in answers] == [200] * 4
            assert all("metrics" in raw.result(answer.json()["request_id"]) for answer in answers)
        else:
            assert answers[-1].status_code == 503
            assert "is full: make room" in answers[-1].json()["detail"]
            assert raw.http.get("healthz").json()["status"] == "stuck"
    with serving(settings) as url, Raw(url) as raw:
        assert "metrics" in raw.result(first)
        if not optional:
            assert "metrics" in raw.result(raw.optim(model, 2 + taken).json()["request_id"])


def fill(journal):
    """Let the file of a journal grow no more."""
    db = journal._database.connection
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count={pages}")


class sdk_of:  # noqa: N801
    """The official client of whatever a nurse serves, made when it is first wanted."""

    def __init__(self, nurse):
        self._nurse, self._client, self._manager = nurse, None, None

    def __enter__(self):
        return self._get

    def __exit__(self, *error):
        if self._manager is not None and error[0] is None:
            self._nurse.start()
            self._nurse.up()
            self._manager.__exit__(*error)
            self._nurse.kill()

    def _get(self):
        if self._client is None:
            self._manager = sdk(self._nurse.url)
            self._client = self._manager.__enter__()
        return self._client


def train(client):
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(ADAM).result(60)


def drawn(sampler, pending=None):
    sequence = (pending or sampler.sample(PROMPT, 1, LONG)).result(60).sequences[0]
    return list(sequence.tokens), list(sequence.logprobs)


def logprobs(client):
    return list(client.forward([datum()], "cross_entropy").result(60).loss_fn_outputs[0]["logprobs"].data)
