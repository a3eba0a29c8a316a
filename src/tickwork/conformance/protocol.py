"""The wire itself: repeated requests, unknown options. Raw HTTP, with the official SDK's own encoding."""

from __future__ import annotations

from typing import Any

import numpy as np

from tickwork.conformance.probe import FoundError, Verdict, probe, require, same
from tickwork.conformance.target import Target


class Wire:
    """One training model over raw HTTP."""

    def __init__(self, target: Target) -> None:
        import httpx  # noqa: PLC0415  the SDK brings it

        self._target = target
        headers = {"X-API-Key": target.api_key}
        self.http = httpx.Client(base_url=f"{target.base_url}/api/v1/", headers=headers, timeout=target.seconds)
        version = {"tags": [], "user_metadata": {}, "sdk_version": target.tinker.__version__, "type": "create_session"}
        session = self.ok("create_session", version)["session_id"]
        lora = {"rank": 8, "seed": 1, "train_unembed": True, "train_mlp": True, "train_attn": True}
        ask = {"session_id": session, "model_seq_id": 0, "base_model": target.model, "lora_config": lora}
        promise = self.ok("create_model", {**ask, "optimizer_config": {"type": "adamw"}, "type": "create_model"})
        self.result(promise)
        self.model_id = f"{session}:train:0"

    def post(self, path: str, body: Any) -> Any:
        """Post JSON."""
        return self.http.post(path, json=body)

    def ok(self, path: str, body: Any) -> Any:
        """Post JSON that must be taken."""
        answer = self.post(path, body)
        if answer.status_code != 200:
            raise FoundError(Verdict.BROKEN, f"{path} answers {answer.status_code}: {answer.text[:100]}")
        return answer.json()

    def result(self, promise: Any, *, proto: bool = False) -> Any:
        """Poll until there is a result."""
        headers = {"Accept": "application/x-protobuf"} if proto else {}
        for _ in range(1000):
            answer = self.http.post("retrieve_future", json={"request_id": promise["request_id"]}, headers=headers)
            if answer.status_code != 408:
                return answer.content if proto else answer.json()
        raise FoundError(Verdict.BROKEN, "1,000 polls without a result")

    def learn(self, seq_id: int, *, forward_only: bool = False) -> Any:
        """Post a pass."""
        from tinker.proto.request_conv import forward_backward_request_to_proto  # noqa: PLC0415
        from tinker.types.forward_backward_input import ForwardBackwardInput  # noqa: PLC0415
        from tinker.types.forward_backward_request import ForwardBackwardRequest  # noqa: PLC0415

        given = ForwardBackwardInput(data=[self._target.datum()], loss_fn="cross_entropy", loss_fn_config=None)
        message = forward_backward_request_to_proto(ForwardBackwardRequest(given, self.model_id, seq_id))
        message.forward_only = forward_only
        media = {"Content-Type": "application/x-protobuf"}
        return self.http.post("forward_backward", content=message.SerializeToString(), headers=media).json()

    def step(self, seq_id: int, **more: Any) -> Any:
        """Post an optimizer step."""
        adam = {"learning_rate": 0.05, "beta1": 0.9, "beta2": 0.95, "eps": 1.0, "weight_decay": 0.0}
        adam = {**adam, "grad_clip_norm": 0.0, **more.pop("adam", {})}
        body = {"model_id": self.model_id, "seq_id": seq_id, "type": "optim_step", "adam_params": adam, **more}
        return self.post("optim_step", body)

    def scores(self, seq_id: int) -> np.ndarray:
        """Return the logprobs of the datum."""
        from tinker.proto.response_conv import deserialize_forward_backward_output  # noqa: PLC0415

        out = deserialize_forward_backward_output(self.result(self.learn(seq_id, forward_only=True), proto=True))
        found: np.ndarray = out.loss_fn_outputs[0]["logprobs"].to_numpy()
        return found


@probe
def the_same_number_twice_is_one_request(target: Target) -> str:
    """A request that is sent again, as after a broken connection, is not done again."""
    once, twice = Wire(target), Wire(target)
    for wire, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            passed = wire.learn(1)
        for _ in range(times):
            stepped = wire.step(2).json()
        wire.result(passed, proto=True)
        wire.result(stepped)
    same(twice.scores(3), once.scores(3), "each request sent twice, against once")
    return "sent twice, done once"


@probe
def early_numbers_wait(target: Target) -> str:
    """Requests that arrive out of order are done in order."""
    straight, crossed = Wire(target), Wire(target)
    first, second = straight.learn(1), straight.step(2).json()
    late, early = crossed.step(2).json(), crossed.learn(1)
    for wire, promises in ((straight, (first, second)), (crossed, (early, late))):
        wire.result(promises[0], proto=True)
        wire.result(promises[1])
    same(crossed.scores(3), straight.scores(3), "step before pass, against pass before step")
    return "done in the order of their numbers"


@probe
def unknown_options_are_refused(target: Target) -> str:
    """An option that nobody knows is not taken silently."""
    wire = Wire(target)
    asks: tuple[dict[str, Any], ...] = ({"nesterov": True}, {"adam": {"amsgrad": True}})
    for seq_id, more in enumerate(asks, 1):
        answer = wire.step(seq_id, **more)
        told = answer.json()
        if answer.status_code == 200:
            told = wire.result(told)
        option = next(iter(more.get("adam", more)))
        require(answer.status_code in (400, 422) or "error" in told, f"{option!r} was accepted", Verdict.IGNORED)
    return "refused"


@probe
def results_can_be_fetched_again(target: Target) -> str:
    """A result lost on its way can be fetched once more."""
    wire = Wire(target)
    promise = wire.step(1).json()
    require(wire.result(promise) == wire.result(promise), "the second time it is another")
    return "the same again"


@probe
def unknown_keys_are_refused(target: Target) -> str:
    """Where keys are needed, a wrong one does not open."""
    import httpx  # noqa: PLC0415

    ask = {"tags": [], "user_metadata": {}, "sdk_version": "0", "type": "create_session"}
    headers = {"X-API-Key": "tml-no-such-key-0000"}
    answer = httpx.post(f"{target.base_url}/api/v1/create_session", json=ask, headers=headers, timeout=target.seconds)
    if answer.status_code == 200:
        return "SKIPPED: this server asks for no keys"
    require(answer.status_code in (401, 403), f"a wrong key is answered {answer.status_code}")
    return f"answered {answer.status_code}"
