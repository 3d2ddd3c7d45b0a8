"""Which quantization methods exist, what each does, and which schemes it serves."""

from dataclasses import dataclass, replace
from typing import Literal

from specjax.config import ModelConfig
from specjax.errors import ConfigError
from specjax.quant import scheme as schemes
from specjax.quant.scheme import Scheme
from specjax.quantize import smoothquant
from specjax.quantize.grid import ClipSearch

Rounding = Literal["rtn", "gptq"]
METHODS = ("rtn", "gptq", "smoothquant", "qqq", "qoq")
DENSE_HEAD = "dense"
_SMOOTHING = ("smoothquant", "qqq", "qoq")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a model is quantized, besides the calibration text.

    Attributes:
        scheme: weights and activations of all linears of the decoder layers; embeddings and norms
            stay dense.
        head: of the output head, per channel and to nearest; None: it stays as it is.
        group_size: input features that share a scale; -1 is all of them.
        rounding: to nearest, or GPTQ.
        smooth: whether SmoothQuant is applied first.
        strength: its migration strength, None to search it per site.
        smooth_outputs: also smooth the inputs of o_proj and down_proj.
        act_order: GPTQ visits features by falling Hessian diagonal.
        damping: GPTQ's share of the mean diagonal.
        clip: search for each group's range, or None to cover it.
    """

    scheme: Scheme
    head: Scheme | None = None
    group_size: int = -1
    rounding: Rounding = "gptq"
    smooth: bool = False
    strength: float | None = None
    smooth_outputs: bool = False
    act_order: bool = True
    damping: float = 0.01
    clip: ClipSearch | None = None

    @property
    def needs_calibration(self) -> bool:
        return self.smooth or self.rounding == "gptq"


def make(
    scheme: str,
    method: str,
    *,
    head_scheme: str = DENSE_HEAD,
    group_size: int | None = None,
    symmetric: bool = True,
    act_order: bool = True,
    damping: float = 0.01,
    clip: bool | None = None,
    strength: float | None = None,
) -> Recipe:
    """The recipe of a method by name.

    Args:
        scheme: name of a scheme; "w4a16" with `symmetric` False is "w4a16-asym".
        method: "rtn" rounds to nearest; "gptq" propagates errors; "smoothquant" smooths, then
            rounds to nearest; "qqq" smooths, o_proj's and down_proj's inputs too, then GPTQ (QQQ,
            arXiv 2406.09904); "qoq" smooths (weakly, as QServe does for 4-bit weights), then GPTQ on
            QoQ's grids.
        head_scheme: of the output head; see `head`.
        group_size: None is 128 for w4a16, fp4 and QoQ, else -1 (per channel).
        symmetric: signed codes without zeros; only w4a16 has both forms.
        act_order, damping: of GPTQ.
        clip: whether to search ranges; None searches for 4-bit weights.
        strength: of smoothing in [0, 1]; None: searched per site for "smoothquant" and "qqq", 0.1
            per channel and 0.3 with groups (DeepCompressor's settings) for "qoq".

    Raises:
        ConfigError: a name is unknown, or the combination is not supported; the message says what
            is.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is unknown; supported: {', '.join(METHODS)}")
    if not symmetric and scheme == "w4a16":
        scheme = "w4a16-asym"
    found = schemes.lookup(scheme)
    if not symmetric and found.weights.symmetric:
        raise ConfigError(
            f"symmetric=False is not supported with scheme={scheme!r}; schemes with zeros: "
            "w4a16 (symmetric=False), w4a8-qoq"
        )
    if method == "qoq" and found.weights.levels != "qoq":
        raise ConfigError(f"method='qoq' needs scheme='w4a8-qoq', found scheme={scheme!r}")
    if method in ("smoothquant", "qqq") and found.activations is None:
        raise ConfigError(
            f"{method=} eases the rounding of activations, which scheme={scheme!r} does "
            "not round; use it with w8a8, w4a8, w4a8-qqq, w4a8-qoq, w4a4 or fp8, or choose gptq or rtn"
        )
    if strength is not None and not 0 <= strength <= 1:
        raise ConfigError(f"smooth_strength={strength} is outside [0, 1]")
    if strength is not None and method not in _SMOOTHING:
        raise ConfigError(
            f"smooth_strength={strength}: {method=} does not smooth; use {', '.join(_SMOOTHING)}"
        )
    if not 0 < damping < 1:
        raise ConfigError(f"damping={damping} is outside (0, 1)")
    size = _default_group(found) if group_size is None else group_size
    if size != -1 and size <= 0:
        raise ConfigError(f"group_size={size}: expected a positive number, or -1 for per channel")
    if method == "qoq" and strength is None:
        strength = 0.1 if size == -1 else 0.3
    search = found.weights.bits == 4 if clip is None else clip
    return Recipe(
        scheme=found,
        head=head(head_scheme),
        group_size=size,
        rounding="gptq" if method in ("gptq", "qqq", "qoq") else "rtn",
        smooth=method in _SMOOTHING,
        strength=strength,
        smooth_outputs=method == "qqq",
        act_order=act_order,
        damping=damping,
        clip=ClipSearch() if search else None,
    )


def head(name: str) -> Scheme | None:
    """The scheme of an output head; None for "dense".

    Raises:
        ConfigError: there is no such scheme, or not for heads: what 4 bits do to logits is worse than what they save.
    """
    if name == DENSE_HEAD:
        return None
    fitting = [key for key, scheme in schemes.SCHEMES.items() if scheme.weights.bits == 8]
    if name not in fitting:
        raise ConfigError(f"head_scheme={name!r}: supported are {DENSE_HEAD}, {', '.join(fitting)}")
    return schemes.lookup(name)


def head_at_load(scheme: str | None) -> str:
    """The scheme of the output head where nobody asks for one: integers beside integers, else what is stored.

    A dense head would take a third of a step of a small W8A8 model.
    """
    spec = None if scheme is None else schemes.lookup(scheme).activations
    return "w8a8" if spec is not None and (spec.kind, spec.bits) == ("int", 8) else DENSE_HEAD


def at_load(scheme: str, config: ModelConfig) -> Recipe:
    """Rounding to nearest without calibration, in groups of 128, 64 or 32 (or per channel) as the model's widths allow.

    Raises:
        ConfigError: the scheme is unknown.
    """
    recipe = make(scheme, "rtn")
    if recipe.group_size == -1:
        return recipe
    fitting = (
        size
        for size in (128, 64, 32)
        if all(width % size == 0 for width in _widths(config).values())
    )
    return replace(recipe, group_size=next(fitting, -1))


def _default_group(scheme: Scheme) -> int:
    grouped = scheme.weights.bits == 4 and (
        scheme.activations is None or scheme.weights.levels == "qoq"
    )
    return 128 if grouped else -1


def check_model(recipe: Recipe, config: ModelConfig) -> None:
    """Refuses a recipe that a model's shapes do not allow, before any work.

    Raises:
        ConfigError: the group size does not divide an input width (the message lists sizes that do), or tokens skip
            layers and the recipe calibrates.
    """
    if recipe.needs_calibration and config.depth is not None:
        raise ConfigError(
            "the model's tokens skip layers (dynamic_* keys), and calibration runs all layers for all tokens; "
            "use method='rtn'"
        )
    if recipe.smooth:
        smoothquant.check_architecture(config, recipe.smooth_outputs)
    for name, width in _widths(config).items():
        schemes.check_group_size(width, recipe.group_size, name)


def _widths(config: ModelConfig) -> dict[str, int]:
    return {
        "q_proj, k_proj, v_proj, gate_proj and up_proj": config.hidden_size,
        "o_proj": config.num_heads * config.head_dim,
        "down_proj": config.intermediate_size,
    }
