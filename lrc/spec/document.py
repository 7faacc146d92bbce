"""The spec file as a model: where a model may become low-rank, what may be spent, and what shall be left at the end."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from lrc.spec.base import SpecModel
from lrc.spec.registry import EXPORTERS, METRICS, PASSES, Registered


class Stored(SpecModel):
    """The weights that the model comes with."""

    type: Literal["stored"] = "stored"
    seed: ClassVar[None] = None


class RandomStart(SpecModel):
    """Weights as the model's own class starts them, for training from scratch; stored ones are not read."""

    type: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0, description="Of the numbers.")


def _from_word(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


StartField = Annotated[
    Annotated[Stored | RandomStart, Field(discriminator="type")],
    BeforeValidator(_from_word, json_schema_input_type=Stored | RandomStart | Literal["stored", "random"]),
]


class ModelSpec(SpecModel):
    """The model to compile."""

    path: str | None = Field(
        default=None,
        description="A Hugging Face folder, hub id, pkg://package/dir, package.module:factory, or model.pt2; "
        "MODEL on the command line wins.",
    )
    task: str | None = Field(default=None, description="As transformers names it; inferred from config.json.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of the loaded weights; auto: as stored, and float32 for random ones."
    )
    device: str = Field(default="cpu", description="Where the model runs while it is measured.")
    weights: str | None = Field(default=None, description="A safetensors file for a `module:factory` model.")
    init: StartField = Field(
        default=Stored(), description="stored: the weights that the model comes with; random: as its class starts them."
    )
    revision: str | None = Field(default=None, description="Of a hub id.")
    trust_remote_code: bool = Field(default=False, description="Let the folder's own code run (needs --allow-code).")


class CalibrationSpec(SpecModel):
    """The sample inputs that statistics are taken on."""

    dataset: str = Field(
        description="A .txt (one sample a line), .jsonl, .csv, .npz or .safetensors file beside the spec, or "
        "package.module:factory that yields batches (needs --allow-code)."
    )
    samples: int = Field(default=128, ge=1, description="How many are drawn, without replacement.")
    max_length: int = Field(default=128, ge=1, description="Tokens a sample.")
    batch_size: int = Field(default=16, ge=1, description="Samples that run together.")
    seed: int = Field(default=0, ge=0, description="Of the draw and of every random number after it.")
    text_column: str | None = Field(default=None, description="The column of text in .jsonl and .csv files.")
    by_block: bool | Literal["auto"] = Field(
        default="auto",
        description="Hold the activations of one block at a time where gradients are measured, and compute them a second time; "
        "auto: where those of a batch would take more than 1 GiB.",
    )
    cache: str | None = Field(default=None, description="Where statistics are kept; .lrc-cache beside the output.")


class GatesSpec(SpecModel):
    """What must hold, else exit code 3 (the result is written all the same)."""

    max_degradation: float | None = Field(
        default=None, ge=0, description="Largest relative loss of any metric against the original model."
    )
    min_improvement: float | None = Field(
        default=None, description="Smallest relative gain of every metric against the original model."
    )
    at_least: dict[str, float] = Field(default={}, description="Smallest value of a metric, by name.")
    at_most: dict[str, float] = Field(default={}, description="Largest value of a metric, by name.")


class EvaluateSpec(SpecModel):
    """How the result is judged, beside the original model."""

    metrics: list[Annotated[SpecModel, Registered(METRICS)]] = Field(default=[], description="Metric names, or mappings.")
    dataset: str | None = Field(default=None, description="Data of every metric that names none of its own.")
    samples: int | None = Field(default=None, ge=1, description="How many samples are used; all without it.")
    max_length: int = Field(default=128, ge=1, description="Tokens a sample.")
    batch_size: int = Field(default=16, ge=1, description="Samples that run together.")
    text_column: str | None = Field(default=None, description="The column of text in .jsonl and .csv files.")
    gates: GatesSpec = Field(default=GatesSpec(), description="What must hold.")


class ParetoSpec(SpecModel):
    """Other budgets that are planned from the same decompositions, for the plan and the report."""

    budgets: list[float] = Field(
        min_length=1,
        description="Amounts of every pass's own budget (params_kept, size_mb, …); of params_kept for one of quality.",
    )
    metric: Annotated[SpecModel, Registered(METRICS)] | None = Field(
        default=None, description="Measured on the model of each budget, on the data of `evaluate`; none without it."
    )


class Document(SpecModel):
    """A spec of lrc."""

    version: Literal[1] = Field(description="Of the spec format.")
    schema_: str | None = Field(default=None, alias="$schema", description="For editors.")
    model: ModelSpec = Field(default=ModelSpec(), description="The model to compile.")
    calibration: CalibrationSpec | None = Field(default=None, description="Sample inputs; needed by data-aware solvers.")
    passes: list[Annotated[SpecModel, Registered(PASSES)]] = Field(default=[], description="The rewriting passes, in order.")
    evaluate: EvaluateSpec = Field(default=EvaluateSpec(), description="How the result is judged.")
    pareto: ParetoSpec | None = Field(default=None, description="Other budgets that the plan and the report compare.")
    export: list[Annotated[SpecModel, Registered(EXPORTERS)]] = Field(
        default=[], description="What is written beside the plan: format names, or mappings with `format`."
    )
    output: str = Field(default="out", description="The output folder, from the current one.")

    def datasets(self) -> dict[str, str]:
        """Return the data files and factories that the document reads, by the place that names them."""
        judged = self.evaluate
        named = {"calibration.dataset": self.calibration.dataset if self.calibration else None}
        named["evaluate.dataset"] = judged.dataset if judged.metrics else None
        named |= {f"evaluate.metrics.{i}.dataset": getattr(m, "dataset", None) for i, m in enumerate(judged.metrics)}
        for i, options in enumerate(self.passes):
            named |= {f"passes.{i}.{key}": name for key, name in getattr(options, "datasets", dict)().items()}
            quality = getattr(getattr(options, "rank", None), "quality", None)
            if quality is not None:
                named[f"passes.{i}.rank.quality.metric.dataset"] = getattr(quality.metric, "dataset", None)
                named["evaluate.dataset"] = judged.dataset
        if self.pareto is not None and self.pareto.metric is not None:
            named["pareto.metric.dataset"] = getattr(self.pareto.metric, "dataset", None)
            named["evaluate.dataset"] = judged.dataset
        return {place: dataset for place, dataset in named.items() if dataset}

    def resolved(self) -> dict[str, Any]:
        """Return the whole document as plain data, every default written out, as `spec.resolved.yaml` holds it."""
        return self.model_dump(mode="json", by_alias=True, exclude={"schema_"})
