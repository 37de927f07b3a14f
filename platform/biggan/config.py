"""The configuration of a run: one frozen, typed, validated object.

The command line, YAML files, notebooks and Ray Tune all build the same `RunConfig`. Tune's
search space addresses its fields by dotted name (``optim.lr_g``). An unknown name is an error
that suggests the nearest one; a value out of range is an error that names field, value and limit.

Lengths of time are counted in thousands of real images shown to D (``kimg``), never in epochs or
steps, so that runs with different batch sizes can be compared.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from biggan.errors import UserError

RESOLUTIONS = (8, 16, 32, 64, 128, 256, 512)


class ConfigError(UserError):
    """A configuration that cannot be used: says the field, the value, the limit and the mend."""


class Section(BaseModel):
    """A frozen group of settings that refuses unknown names."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The networks: BigGAN of Brock, Donahue and Simonyan 2018 (arXiv 1809.11096), appendix B."""

    architecture: Literal["biggan", "biggan-deep"] = "biggan"
    """biggan, or biggan-deep: twice the blocks, each a bottleneck (tables 7-9); needs ch of 4 and
    more."""
    ch_g: int = Field(64, ge=1)
    """Width multiplier of G; the paper's ImageNet models use 96."""
    ch_d: int = Field(64, ge=1)
    """Width multiplier of D."""
    z_dim: int = Field(120, ge=1)
    """Length of the latent vector. With hierarchical z a multiple of (G's blocks + 1)."""
    shared_dim: int = Field(128, ge=1)
    """Length of the class embedding that all of G's conditional batch norms share."""
    shared: bool = True
    """One class embedding for all of G's conditional batch norms; without it each has its own."""
    hierarchical: bool = True
    """Split z into chunks, one for the first layer and one for each block ("skip-z"). The deep
    networks hand all of z to every block."""
    attention: tuple[int, ...] = ()
    """Resolutions that self-attention follows, in G and D; the paper has 64 at 128 pixels."""
    channel_attention: tuple[int, ...] = ()
    """Resolutions that squeeze-and-excitation follows, in G and D (Hu et al. 2018)."""
    init: Literal["orthogonal", "normal"] = "orthogonal"
    """Initial weights: orthogonal (the paper) or N(0, 0.02)."""
    sn_eps: float = Field(1e-6, gt=0)
    """Added to norms in spectral normalization's power iteration."""
    bn_eps: float = Field(1e-5, gt=0)
    """Added to variances in G's class-conditional batch norms."""

    @property
    def deep(self) -> bool:
        """Whether this is BigGAN-deep."""
        return self.architecture == "biggan-deep"

    @model_validator(mode="after")
    def _needs_a_shared_embedding(self) -> Self:
        for name, wants in (("hierarchical", self.hierarchical), ("biggan-deep", self.deep)):
            if wants and not self.shared:
                raise ValueError(
                    f"shared = False does not go with {name}: z is joined to the shared class"
                    " embedding; set shared = True, or"
                    f" {'architecture = biggan' if self.deep else 'hierarchical = False'}"
                )
        if self.deep and min(self.ch_g, self.ch_d) < 4:
            raise ValueError(
                f"ch_g = {self.ch_g}, ch_d = {self.ch_d}: biggan-deep needs 4 or more, since its"
                " bottlenecks are a quarter as wide"
            )
        return self


class LossConfig(Section):
    """The adversarial objective and the regularization of the weights."""

    name: Literal["hinge", "bce", "least_squares", "wasserstein"] = "hinge"
    """hinge (the paper), bce (non-saturating; Goodfellow 2014), least_squares or wasserstein."""
    ortho_g: float = Field(1e-4, ge=0)
    """Strength of orthogonal regularization on G's weights (the paper's beta); 0 is off."""
    ortho_d: float = Field(0.0, ge=0)
    """Strength of orthogonal regularization on D's weights; the paper leaves it off."""
    ortho_variant: Literal["modified", "full"] = "modified"
    """modified: eq. 3 of the paper, which leaves norms free; full: Brock et al. 2016."""
    r1: float = Field(0.0, ge=0)
    """Gamma of R1, D's squared gradient on real images (Mescheder et al. 2018); 0 is off."""
    r1_every: int = Field(1, ge=1)
    """Steps between applications of R1, each then so many times as strong."""
    lecam: float = Field(0.0, ge=0)
    """Weight of LeCam, for little data (Tseng et al. 2021; 0.1 to 0.5 on CIFAR); 0 is off."""
    lecam_decay: float = Field(0.99, ge=0, lt=1)
    """Decay an update of LeCam's moving averages of D's logits."""
    consistency: float = Field(0.0, ge=0)
    """Weight of consistency of D under flips and shifts on real images (CR, Zhang et al. 2019;
    10 there); 0 is off. Wrong where mirrored images are not of the data's kind."""
    consistency_fake: float = Field(0.0, ge=0)
    """The same on fake images (with it: bCR, Zhao et al. 2020; 10 there)."""
    topk: float = Field(1.0, gt=0, le=1)
    """Part of a micro-batch's fakes, those that D rates best, that G learns from in the end
    (Sinha et al. 2020; 0.5 to 0.75 there); 1 is off."""
    topk_kimg: float = Field(0.0, ge=0)
    """Thousand images over which that part falls from 1, geometrically."""


class OptimConfig(Section):
    """Adam, and how many images and updates make a step."""

    batch_size: int = Field(64, ge=2)
    """Real images an update of D sees, over all workers and accumulated micro-batches."""
    lr_g: float = Field(1e-4, gt=0)
    """Adam's learning rate for G; 5e-5 in the paper."""
    lr_d: float = Field(4e-4, gt=0)
    """Adam's learning rate for D; 2e-4 in the paper."""
    beta1: float = Field(0.0, ge=0, lt=1)
    """Adam's first-moment decay."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Adam's second-moment decay."""
    eps: float = Field(1e-6, gt=0)
    """Adam's epsilon."""
    num_D_steps: int = Field(1, ge=1)
    """Updates of D before each update of G, each on new images; 2 in the paper."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches that make up one batch, where a whole one does not fit in memory.
    Batch-norm moments and spectral norms then advance once per micro-batch."""


class EMAConfig(Section):
    """The exponential moving average of G's weights, which is what is evaluated and served."""

    decay: float = Field(0.9999, ge=0, lt=1)
    """Decay a step."""
    start_kimg: float = Field(0.0, ge=0)
    """Before this many thousand images the average is a plain copy of G (``ema_start``)."""


def _yaml_off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 takes a bare off for a boolean.


class DataConfig(Section):
    """Which images are shown to D, how often, and how they get there."""

    flip: bool = False
    """Mirror half of the real images left to right. Wrong for text, digits and most scans."""
    classes: tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...] = ()
    """Names of the classes to train on; the generator then knows no others. None is all."""
    balance: Annotated[Literal["off", "sqrt", "uniform"], BeforeValidator(_yaml_off)] = "off"
    """How often each class is shown, real and fake: as it occurs; in proportion to the square root
    of its images, for long tails; or all equally often. FID's labels stay as they occur."""
    mode: Literal["auto", "memory", "stream"] = "auto"
    """memory: decoded once a machine, and mapped; stream: decoded in passing, by Ray Data; auto:
    memory where that fits, settled when a run begins. The order differs between the two."""
    window_mib: float = Field(512.0, gt=0)
    """Decoded images among which stream shuffles, in MiB; one stored part at least."""

    @model_validator(mode="after")
    def _no_balance_in_a_stream(self) -> Self:
        if self.mode == "stream" and self.balance != "off":
            raise ValueError(
                f"data.balance {self.balance!r} picks images from all of the dataset, which"
                " data.mode 'stream' never has at hand: set data.mode to memory, or data.balance"
                " to off"
            )
        return self

    @field_validator("classes")
    @classmethod
    def _each_class_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"class {twice[0]!r} is named twice: name each once")
        return names


class AugmentConfig(Section):
    """What D's input, real and fake alike, goes through: for small datasets."""

    name: Literal["none", "diffaugment", "ada"] = "none"
    """none; diffaugment (Zhao et al. 2020); ada, whose strength follows D (Karras et al. 2020)."""
    policy: tuple[Literal["color", "translation", "cutout"], ...] = (
        "color",
        "translation",
        "cutout",
    )
    """What diffaugment consists of."""
    ada_target: float = Field(0.6, gt=0, lt=1)
    """What ada holds the mean sign of D's logits on real images at."""
    ada_kimg: float = Field(500.0, gt=0)
    """Thousand images in which ada's probability can go from 0 to 1."""


Precision = Literal["float32", "tf32", "bfloat16", "float16"]


class SpeedConfig(Section):
    """How a step is computed. `benchmarks/README.md` has the figures behind the defaults."""

    precision_g: Precision = "float32"
    """What G's products are computed in; float16 with gradient scaling. Weights, their averages
    and batch-norm moments stay in float32."""
    precision_d: Precision = "float32"
    """What D's products are computed in; tf32 needs tf32 for both."""
    channels_last: bool = True
    """Keep feature maps in NHWC order, which convolutions prefer."""
    compile: Annotated[
        Literal["off", "default", "reduce-overhead", "max-autotune"], BeforeValidator(_yaml_off)
    ] = "off"
    """torch.compile's mode for G and D; reduce-overhead uses CUDA graphs."""
    fused_optimizer: bool = True
    """Adam in one kernel for all weights."""
    reuse_fakes: bool = False
    """Let the last D update lend its fakes to G's update, which spares G's second forward."""
    recompute: bool = False
    """Keep only the inputs of the blocks, and compute the rest again in the backward: less
    memory for more time (activation checkpointing)."""
    auto_accumulate: bool = False
    """Where a batch does not fit in memory, take the accumulation that fits, and go on."""
    keep_memory: bool = True
    """On a CPU, keep memory for the next step that would be returned to the system."""

    @model_validator(mode="after")
    def _tf32_is_for_both(self) -> Self:
        if {self.precision_g, self.precision_d} == {"float32", "tf32"}:
            raise ValueError(
                f"precision_g = {self.precision_g!r}, precision_d = {self.precision_d!r}: tf32 is a"
                " switch of the whole process; set both to tf32 or both to float32"
            )
        return self


class CollapseConfig(Section):
    """What counts as a collapse (section 4 of the paper); looked for ten times a window."""

    sigma_growth: float = Field(6.0, gt=1)
    """A layer's largest singular value has grown this many times over within `window_kimg`; 2.5 in
    the healthy first 35 kimg of the digits."""
    d_accuracy: float = Field(0.995, gt=0.5, le=1)
    """D has told real from fake at this rate, both, over the whole of `window_kimg`."""
    class_variance: float = Field(0.02, ge=0)
    """Fakes vary within a class less than this part of what the real images do."""
    window_kimg: float = Field(0.0, ge=0)
    """Thousand images over which trends are taken; also the respite at the start of a run. 0 is
    a thousand steps."""
    lr_factor: float = Field(0.5, gt=0, lt=1)
    """What a rollback multiplies both learning rates by."""
    max_rollbacks: int = Field(5, ge=1)
    """Rollbacks before the guard stops the run."""


class EvalConfig(Section):
    """FID on the averaged generator, in the course of training."""

    every_kimg: float = Field(10.0, gt=0)
    """Thousand images between evaluations; each also makes a checkpoint and a sample sheet."""
    num_samples: int = Field(10_000, ge=2)
    """Generated images an FID is taken over. FID falls as it grows: compare equals only."""
    extractor: str = "classifier"
    """Whose features FID compares: `classifier`, the network trained on the dataset itself;
    `inception`, the published FID's, as pytorch-fid has it; `inception-tf`, as torch-fidelity has
    it; or the path or URI of a TorchScript (.pt) or exported (.pt2) network."""
    inception_weights: str = ""
    """Path or URL of Inception's weights; by default the cached file, else the published one."""
    reference: Literal["train", "held_out"] = "train"
    """The part of the dataset that FID compares with; held_out needs one (prepare --held-out)."""
    mode: Literal["inline", "async"] = "inline"
    """inline: training pauses for an evaluation. async: a task on other resources (a core or GPU
    beside the workers') takes each checkpoint's FID, and training goes on meanwhile."""
    batch_size: int = Field(256, ge=1)
    """Images generated at a time."""
    patience: int = Field(0, ge=0)
    """Stop after this many evaluations in a row without a new lowest FID; 0 never stops."""
    sheet_columns: int = Field(10, ge=1)
    """Classes on the sample sheet, one a column; spread evenly where there are more."""
    sheet_rows: int = Field(8, ge=1)
    """Samples a class on the sample sheet, from latents that stay the same all run."""


class CheckpointConfig(Section):
    """When the whole training state is saved, beyond every evaluation."""

    every_kimg: float = Field(10.0, gt=0)
    """Thousand images between checkpoints; the most that a failure can cost."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept: those with the lowest FID; the latest and the one before it are too."""


class RunConfig(Section):
    """All that decides a run's outcome. What it runs on (workers, GPUs) is not part of it."""

    dataset: str = ""
    """Name, path or URI of a prepared dataset (jobs/prepare.py makes one)."""
    total_kimg: float = Field(1000.0, gt=0)
    """Length of the run in thousand real images shown to D."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides initial weights, data order, latents and flips."""
    model: ModelConfig = ModelConfig()
    """Networks."""
    loss: LossConfig = LossConfig()
    """Objective and regularization."""
    optim: OptimConfig = OptimConfig()
    """Optimizers and batches."""
    ema: EMAConfig = EMAConfig()
    """Weight averaging."""
    data: DataConfig = DataConfig()
    """How real images are shown."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of all that D sees."""
    speed: SpeedConfig = SpeedConfig()
    """Precision, memory layout, compilation."""
    guard: Annotated[Literal["stop", "rollback", "off"], BeforeValidator(_yaml_off)] = "stop"
    """What a collapse leads to: the end of the run, a return to the last good checkpoint with
    smaller learning rates, or nothing."""
    collapse: CollapseConfig = CollapseConfig()
    """When the guard acts."""
    eval: EvalConfig = EvalConfig()
    """FID while training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""

    @model_validator(mode="after")
    def _accumulation_divides_the_batch(self) -> Self:
        optim = self.optim
        if optim.batch_size % optim.accumulation:
            raise ValueError(
                f"optim.batch_size {optim.batch_size} is not a multiple of optim.accumulation"
                f" {optim.accumulation}: change one of them"
            )
        return self

    @model_validator(mode="after")
    def _what_goes_together(self) -> Self:
        if self.speed.reuse_fakes and self.optim.accumulation > 1:
            raise ValueError(
                f"speed.reuse_fakes keeps the fakes of a whole batch, which optim.accumulation"
                f" {self.optim.accumulation} is to avoid: switch one of them off"
            )
        graphs = self.speed.compile in ("reduce-overhead", "max-autotune")
        if graphs and (self.speed.reuse_fakes or self.optim.accumulation > 1):
            raise ValueError(
                f"speed.compile {self.speed.compile!r} keeps each step in CUDA graphs, whose memory"
                " speed.reuse_fakes and optim.accumulation would need for longer: set"
                " speed.compile to default"
            )
        if self.speed.reuse_fakes and self.speed.auto_accumulate:
            raise ValueError(
                "speed.reuse_fakes keeps the fakes of a whole batch, which speed.auto_accumulate"
                " may have to split: switch one of them off"
            )
        if self.eval.mode == "async" and self.eval.patience:
            raise ValueError(
                f"eval.patience {self.eval.patience} stops a run on its last FIDs, which eval.mode"
                " 'async' learns later: set eval.patience to 0, or eval.mode to inline"
            )
        if self.loss.r1 and self.speed.precision_d == "float16":
            raise ValueError(
                f"loss.r1 {self.loss.r1} takes gradients that are too small for"
                " speed.precision_d 'float16': set it to bfloat16 or float32"
            )
        if self.loss.r1 and self.speed.compile != "off":
            raise ValueError(
                f"loss.r1 {self.loss.r1} differentiates twice, which speed.compile"
                f" {self.speed.compile!r} cannot: switch one of them off"
            )
        return self

    @property
    def step_images(self) -> int:
        """Real images that one step (num_D_steps updates of D, one of G) consumes."""
        return self.optim.batch_size * self.optim.num_D_steps

    @property
    def needs_noise(self) -> bool:
        """Whether anything random happens to images before D sees them."""
        consistent = self.loss.consistency or self.loss.consistency_fake
        return self.augment.name != "none" or consistent > 0

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build a configuration from nested mappings; raises `ConfigError` on anything unfit."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error)) from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunConfig:
        """Read a YAML file of nested sections; raises `ConfigError` on anything unfit."""
        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{path} is no readable YAML: {' '.join(str(error).split())}"
            ) from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, not sections of settings")
        return cls.parse(values)

    def override(self, values: Mapping[str, Any]) -> RunConfig:
        """This configuration with fields replaced, by dotted name: ``{"optim.lr_g": 1e-4}``."""
        nested = self.model_dump()
        for dotted, value in values.items():
            *sections, field = dotted.split(".")
            target = nested
            for section in sections:
                # An unknown section becomes an entry that parse() refuses, with a suggestion.
                inner = target.setdefault(section, {})
                if not isinstance(inner, dict):
                    raise ConfigError(f"{dotted}: {section} is a value, not a section")
                target = inner
            target[field] = value
        return self.parse(nested)

    def flatten(self) -> dict[str, Any]:
        """Every field by dotted name."""
        return dict(_flatten(self.model_dump(mode="json")))


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


FIELD_NAMES: tuple[str, ...] = tuple(RunConfig().flatten())
"""Every dotted field name of a `RunConfig`."""


def explain(error: ValidationError) -> str:
    """One line a problem: the dotted field, the value, the limit, and the nearest known name."""
    lines = []
    for problem in error.errors():
        dotted = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{dotted} is no setting{_suggest(dotted)}")
        elif dotted:
            lines.append(f"{dotted} = {problem['input']!r}: {problem['msg']}")
        else:
            lines.append(problem["msg"].removeprefix("Value error, "))
    return "; ".join(lines)


def _suggest(dotted: str) -> str:
    sections = {name.split(".")[0] for name in FIELD_NAMES if "." in name}
    leaf = dotted.split(".")[-1]
    near = [name for name in FIELD_NAMES if name.split(".")[-1] == leaf]  # In the wrong section.
    near = near or difflib.get_close_matches(dotted, [*FIELD_NAMES, *sections], n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else "; known: " + ", ".join(FIELD_NAMES)
