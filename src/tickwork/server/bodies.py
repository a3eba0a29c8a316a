"""The JSON bodies of sessions, training and checkpoints, one model each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tickwork import requests, types
from tickwork.convert import as_adam_params
from tickwork.errors import InvalidRequestError
from tickwork.server.strict import MOST_METADATA, Body, Items, Metadata, Name, Seconds, Seq

# Tags of one session.
MOST_TAGS = 256


class ClientConfig(Body):
    """Which SDK asks."""

    sdk_version: str


class CreateSession(Body):
    """A new client."""

    tags: Annotated[Items[Name], Field(max_length=MOST_TAGS)] = Field(default_factory=list)
    user_metadata: Metadata | None = None
    sdk_version: Name = ""
    project_id: Name | None = None
    display_name: Name | None = None
    type: Literal["create_session"] = "create_session"


class Heartbeat(Body):
    """A client lives."""

    session_id: str
    type: Literal["session_heartbeat"] = "session_heartbeat"


class FinishReason(Body):
    """How a client ended."""

    type: Literal["success", "errored", "interrupted"]


class FinishSession(Body):
    """A client ends."""

    reason: FinishReason
    detail: Annotated[str, Field(max_length=MOST_METADATA)] | None = None


class AssignProject(Body):
    """A session's project."""

    project_id: Name


class Telemetry(Body):
    """Events; any object will do, since nothing of it is kept."""

    model_config = ConfigDict(extra="ignore")


class LoraConfig(Body):
    """The shape of an adapter."""

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Body):
    """The choice of an optimizer."""

    type: str = "adamw"
    version: int | None = None


class CreateModel(Body):
    """A new training model."""

    session_id: str
    model_seq_id: Seq
    base_model: str
    user_metadata: Metadata | None = None
    lora_config: LoraConfig = LoraConfig()
    optimizer_config: OptimizerConfig = OptimizerConfig()
    type: Literal["create_model"] = "create_model"


class LoadWeights(Body):
    """A checkpoint, for a living model or for a new one."""

    model_id: str | None = None
    seq_id: Seq | None = None
    session_id: str | None = None
    model_seq_id: Seq | None = None
    base_model: str | None = None
    user_metadata: Metadata | None = None
    path: str
    optimizer: bool
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None
    type: Literal["load_weights"] = "load_weights"


class GetInfo(Body):
    """Which model is asked about."""

    model_id: str
    type: Literal["get_info"] = "get_info"


class UnloadModel(Body):
    """Which model is let go."""

    model_id: str
    type: Literal["unload_model"] = "unload_model"


class AdamParams(Body):
    """One step of AdamW."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OtherParams(Body):
    """One step of another optimizer, which is refused by its name."""

    model_config = ConfigDict(extra="allow")
    type: str


class OptimStep(Body):
    """An optimizer step."""

    model_id: str
    seq_id: Seq
    adam_params: AdamParams | None = None
    optimizer_params: OtherParams | None = None
    type: Literal["optim_step"] = "optim_step"

    def params(self) -> types.AdamParams:
        """Return AdamW's parameters.

        Raises:
            InvalidRequestError: another optimizer's, or none, or out of range.
        """
        if self.optimizer_params is not None:
            kind = self.optimizer_params.type
            raise InvalidRequestError(f"{kind!r} is not offered: only AdamW is", field="optimizer_params.type")
        if self.adam_params is None:
            raise InvalidRequestError("is needed", field="adam_params")
        return as_adam_params(self.adam_params)


class SaveWeights(Body):
    """A checkpoint to go on from; ``path`` is its name."""

    model_id: str
    seq_id: Seq
    path: str
    ttl_seconds: Seconds | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None
    type: Literal["save_weights"] = "save_weights"


class SaveWeightsForSampler(Body):
    """A checkpoint for samplers with a name, or a sampler without."""

    model_id: str
    seq_id: Seq
    path: str | None = None
    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Seconds | None = None
    user_metadata: Metadata | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveWeightsExternal(Body):
    """A checkpoint for download."""

    model_id: str
    seq_id: Seq
    path: str
    ttl_seconds: Seconds | None = None
    age_encryption_recipients: Items[str] | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class LossInput(Body):
    """One parameter of a custom loss."""

    name: str
    rank: Literal[0, 1, 2]


class LossNode(Body):
    """One operation of a custom loss."""

    op: str
    name: str
    target: str
    args: Items[Any] = Field(default_factory=list)
    kwargs: dict[str, Any] = Field(default_factory=dict)


class LossGraph(Body):
    """The operations of a custom loss, in order."""

    format: Literal[1] = 1
    nodes: Items[LossNode]


class CreateCustomLoss(Body):
    """A custom loss, as data."""

    session_id: str
    custom_loss_seq_id: Seq
    name: str
    inputs: Items[LossInput]
    graph: LossGraph
    type: Literal["create_custom_loss"] = "create_custom_loss"

    def loss_graph(self) -> requests.LossGraph:
        """Return it as the engine takes it."""
        nodes = tuple(requests.LossNode(n.op, n.name, n.target, n.args, n.kwargs) for n in self.graph.nodes)
        return requests.LossGraph(self.name, tuple((given.name, given.rank) for given in self.inputs), nodes)


class WeightsInfo(Body):
    """Which checkpoint is asked about."""

    tinker_path: str


class CopyWeights(Body):
    """Which checkpoint is copied, and where to."""

    session_id: str | None = None
    model_seq_id: Seq | None = None
    destination_project_id: Name | None = None
    source_path: str
    ttl_seconds: Seconds | None = None
    weights_access_token: str | None = None


class SetTtl(Body):
    """How long a checkpoint lives from now; null for good."""

    ttl_seconds: Seconds | None
