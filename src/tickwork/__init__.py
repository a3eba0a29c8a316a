"""Tickwork: fine-tune language models through a Tinker-shaped API, on your own hardware."""

from importlib.metadata import version

from tickwork.clients.nursery import open_service

# What you train and sample with.
from tickwork.clients.rest import RestClient
from tickwork.clients.sampling import SamplingClient
from tickwork.clients.service import ServiceClient
from tickwork.clients.training import TrainingClient

# What goes wrong.
from tickwork.errors import (
    CapacityError,
    CheckpointError,
    ClosedError,
    DivergedError,
    EngineStoppedError,
    InvalidRequestError,
    JournalError,
    LossError,
    ModelLoadError,
    QueueFullError,
    RequestCancelledError,
    RequestErrorCategory,
    RequestFailedError,
    TickworkError,
    WrongThreadError,
)

# What you wait for.
from tickwork.futures import APIFuture, Future

# What comes back after a crash.
from tickwork.kept.results import RecordedResult, ResumableRun

# What comes back.
from tickwork.results import (
    Checkpoint,
    ForwardBackwardOutput,
    GetInfoResponse,
    GetServerCapabilitiesResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    ParsedCheckpointTinkerPath,
    SampledSequence,
    SampleResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    TrainingRun,
)

# What you hand over.
from tickwork.tensors import TensorData, TensorDtype
from tickwork.types import (
    AdamOptimizerConfig,
    AdamParams,
    Datum,
    EncodedTextChunk,
    LoraConfig,
    ModelInput,
    ModelInputChunk,
    SamplingParams,
    StopReason,
)

# The name this error has in the official SDK.
TinkerError = TickworkError

__version__ = version("tickwork")

__all__ = [
    "APIFuture",
    "AdamOptimizerConfig",
    "AdamParams",
    "CapacityError",
    "Checkpoint",
    "CheckpointError",
    "ClosedError",
    "Datum",
    "DivergedError",
    "EncodedTextChunk",
    "EngineStoppedError",
    "ForwardBackwardOutput",
    "Future",
    "GetInfoResponse",
    "GetServerCapabilitiesResponse",
    "InvalidRequestError",
    "JournalError",
    "LoadWeightsResponse",
    "LoraConfig",
    "LossError",
    "ModelInput",
    "ModelInputChunk",
    "ModelLoadError",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "QueueFullError",
    "RecordedResult",
    "RequestCancelledError",
    "RequestErrorCategory",
    "RequestFailedError",
    "RestClient",
    "ResumableRun",
    "SampleResponse",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "ServiceClient",
    "StopReason",
    "TensorData",
    "TensorDtype",
    "TickworkError",
    "TinkerError",
    "TrainingClient",
    "TrainingRun",
    "WrongThreadError",
    "open_service",
]
