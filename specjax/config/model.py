"""Model configuration, read from the fields of a Hugging Face `config.json` in either spelling.

transformers 4 wrote `torch_dtype`, `rope_theta` and `rope_scaling`; transformers 5 writes `dtype` and
`rope_parameters`. What makes an architecture is settings, which its declaration in `specjax.config.architectures` reads
from the fields. Whatever would change the computation and is not implemented is refused by the field's name, before a
weight is read.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from specjax.config import architectures
from specjax.config import fields as read
from specjax.config.architectures import Architecture, parts
from specjax.config.depth import DepthConfig
from specjax.config.rope import RopeConfig, check_rope
from specjax.errors import ConfigError

# What a config.json says of its own folder; an export has its own.
_OF_THE_FOLDER = ("quantization_config", "compression_config", "auto_map", "text_config")
DTYPES = ("float32", "float16", "bfloat16")
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What layers of one model may differ in; layers of a kind share a compiled function.

    Attributes:
        window: tokens that a token sees, itself included; None is all before it.
        rotary: which rotary embedding turns queries and keys: 0 is `rope`, 1 `local_rope`, None is none.
        scale: of the scores, beside `ModelConfig.query_scale`.
    """

    window: int | None = None
    rotary: int | None = 0
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and settings of a decoder; hashable, so it can be static in a jitted program.

    Attributes:
        architecture: Hugging Face class name, one of `specjax.config.architectures.ARCHITECTURES`.
        vocab_size: rows of the embedding table.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides num_heads.
        head_dim: channels of one head; not always hidden_size / num_heads.
        rms_norm_eps: added to the mean square (or variance) in every norm.
        rope: rotary embedding.
        tie_word_embeddings: the output head is the embedding table.
        qkv_bias: q_proj, k_proj and v_proj have a bias.
        o_bias: o_proj has a bias.
        mlp_bias: gate_proj, up_proj and down_proj have a bias.
        max_position_embeddings: longest sequence the model can take, in tokens; includes what its rope is scaled for.
        bos_token_id: token that starts a sequence, if any.
        eos_token_ids: tokens that end generation, possibly none.
        dtype: the checkpoint's own compute dtype, one of `DTYPES`.
        depth: of models with routed layers; None: every token runs through all layers.
        biases: names of the projections with a bias where they are not those of the three flags.
        local_rope: rotary embedding of the layers whose kind says 1.
        rotary: by layer, which rotary embedding it has (see `LayerKind`); empty: `rope` in all.
        windows: by layer, tokens that a token sees, itself included; empty or None: all before it.
        layer_scales: by layer, factor of the scores; empty: 1.
        learned_positions: a table of positions is added to the embeddings.
        qk_norm: norm of queries and keys: of each "head", over the whole "projection", or none.
        norm_kind: "rms", or "layer" (mean removed, with a bias).
        norm_placement: norms "before" attention and feed-forward, "after" them (before the sum), or "both".
        norm_offset: added to the stored gains of norms.
        hidden_act: nonlinearity of the feed-forward.
        gated_mlp: down(act(gate x) * up x), else down(act(up x)).
        query_scale: factor of the scores; None is head_dim^-0.5.
        score_softcap: scores s become cap * tanh(s / cap).
        logit_softcap: the same for logits.
        embedding_multiplier: factor of the embeddings.
        residual_multiplier: factor of what a block adds to the residual stream.
        logits_divisor: divisor of the logits.
        source: the config.json that it was read from, as JSON: what an export keeps. Not compared.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    depth: DepthConfig | None = None
    biases: tuple[str, ...] | None = None
    local_rope: RopeConfig | None = None
    rotary: tuple[int | None, ...] = ()
    windows: tuple[int | None, ...] = ()
    layer_scales: tuple[float, ...] = ()
    learned_positions: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_placement: Literal["before", "after", "both"] = "before"
    norm_offset: float = 0.0
    hidden_act: Activation = "silu"
    gated_mlp: bool = True
    query_scale: float | None = None
    score_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary embeddings of its layers, in the order that `LayerKind.rotary` counts."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    @property
    def declaration(self) -> Architecture:
        """What is declared of its architecture."""
        return architectures.ARCHITECTURES[self.architecture]

    def layer_kind(self, index: int) -> LayerKind:
        """What is special in layer `index`."""
        return LayerKind(
            window=self.windows[index] if self.windows else None,
            rotary=self.rotary[index] if self.rotary else 0,
            scale=self.layer_scales[index] if self.layer_scales else 1.0,
        )

    def has_bias(self, projection: str) -> bool:
        """Whether a projection ("q_proj") has a bias."""
        if self.biases is not None:
            return projection in self.biases
        if projection == "o_proj":
            return self.o_bias
        return self.qkv_bias if projection in ("q_proj", "k_proj", "v_proj") else self.mlp_bias

    @classmethod
    def from_hf(
        cls, config: dict[str, Any], generation_config: dict[str, Any] | None = None
    ) -> "ModelConfig":
        """Reads a parsed config.json; token ids of generation_config.json take precedence.

        Raises:
            ConfigError: a field is missing, malformed, or asks for something not implemented.
        """
        declared = architectures.lookup(config)
        fields = _generic_names(_language_model(config), declared)
        settings = declared.settings(fields)
        fields = fields | {k: v for k, v in settings.items() if k == "intermediate_size"}
        kv_heads = settings.pop("num_kv_heads", None)
        settings.pop("intermediate_size", None)
        heads = read.size(fields, "num_attention_heads")
        kv_heads = kv_heads or read.size(fields, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ConfigError(
                f"num_attention_heads = {heads} is not a multiple of "
                f"num_key_value_heads = {kv_heads}"
            )
        ids = lambda name: _token_ids(name, fields, generation_config or {})
        biases = {"qkv_bias": False, "o_bias": False, "mlp_bias": False}
        rope = {"rope": RopeConfig()}
        settings = biases | rope | settings
        found = cls(
            architecture=declared.name,
            vocab_size=read.size(fields, "vocab_size"),
            hidden_size=read.size(fields, "hidden_size"),
            intermediate_size=read.size(fields, "intermediate_size"),
            num_layers=read.size(fields, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_head_dim(fields, heads),
            rms_norm_eps=read.positive("rms_norm_eps", fields.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=read.flag(fields, "tie_word_embeddings"),
            max_position_embeddings=_positions(fields, settings["rope"]),
            bos_token_id=next(iter(ids("bos_token_id")), None),
            eos_token_ids=ids("eos_token_id"),
            dtype=_dtype(fields),
            depth=DepthConfig.from_hf(fields),
            source=json.dumps(config),
            **settings,
        )
        found._check_ropes()
        parts.foreign(fields, declared.name)
        other = architectures.by_model_type(config)
        if other is not None and other is not declared:
            _check_same(found, other, config)
        return found

    def _check_ropes(self) -> None:
        used = {self.layer_kind(index).rotary for index in range(self.num_layers)}
        for index in used - {None}:
            check_rope(self.ropes[index], self.head_dim)

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 (and `from_hf`) read back to this configuration.

        What it was read from is kept, but for what has changed.

        Raises:
            ConfigError: the architecture cannot state this configuration.
        """
        stated = self._generic_fields() if self.source is None else json.loads(self.source)
        stated = {k: v for k, v in _language_model(stated).items() if k not in _OF_THE_FOLDER}
        eos = self.eos_token_ids
        rope = self.rope.to_hf()
        stated |= {
            "architectures": [self.architecture],
            "model_type": self.declaration.model_type,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
        }
        if not self.learned_positions:
            stated |= {
                "rope_parameters": rope,
                "rope_theta": self.rope.theta,
                "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}
                if self.rope.kind != "default"
                else None,
            }
        if self.rope.rotary_fraction != 1:
            stated["partial_rotary_factor"] = self.rope.rotary_fraction
        if self.local_rope is not None:
            local = self.local_rope.to_hf()
            stated["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
            stated["rope_local_base_freq"] = self.local_rope.theta
        if "original_max_position_embeddings" in stated:
            stated["original_max_position_embeddings"] = self.rope.original_max_position_embeddings
        stated |= {} if self.depth is None else self.depth.to_hf()
        self._check_stated(stated)
        return stated

    def _check_stated(self, stated: dict[str, Any]) -> None:
        """Refuses what would be read back as another configuration, by the field's name."""
        back = ModelConfig.from_hf(stated)
        if self.biases is not None:
            back = dataclasses.replace(
                back,
                biases=self.biases,
                qkv_bias=self.qkv_bias,
                o_bias=self.o_bias,
                mlp_bias=self.mlp_bias,
            )
        for field in dataclasses.fields(self):
            wanted, found = getattr(self, field.name), getattr(back, field.name)
            if field.compare and wanted != found:
                raise ConfigError(
                    f"{self.architecture} cannot state {field.name} = {wanted!r}: "
                    f"it would be read as {found!r}"
                )

    def _generic_fields(self) -> dict[str, Any]:
        """The fields of a configuration that was made in code."""
        positions = self.max_position_embeddings
        if self.rope.kind == "dynamic":
            positions = self.rope.original_max_position_embeddings
        elif self.rope.kind == "linear":
            positions = round(positions / self.rope.factor)
        fields: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": positions,
        }
        match self.architecture:
            case "LlamaForCausalLM":
                fields |= {"attention_bias": self.o_bias, "mlp_bias": self.mlp_bias}
            case "MistralForCausalLM":
                fields |= {"sliding_window": None}
            case "Qwen2ForCausalLM":
                fields |= {"use_sliding_window": False}
        return fields


def _check_same(found: ModelConfig, other: Architecture, config: dict[str, Any]) -> None:
    """Refuses two names of architectures that are not the same model: frameworks follow one or the other."""
    try:
        as_other = ModelConfig.from_hf({**config, "architectures": [other.name]})
    except ConfigError:
        as_other = None
    same = as_other is not None and found.declaration.layout == other.layout
    if not same or _comparable(as_other) != _comparable(found):
        raise ConfigError(
            f"architectures = {config.get('architectures')!r} and model_type = {config.get('model_type')!r} are two "
            "architectures: correct the one that is wrong"
        )


def _comparable(config: ModelConfig) -> tuple[ModelConfig, tuple[LayerKind, ...]]:
    """What a configuration computes, without the architecture's name and token ids."""
    kinds = tuple(config.layer_kind(index) for index in range(config.num_layers))
    named = dict(architecture="", bos_token_id=None, eos_token_ids=())
    return dataclasses.replace(config, windows=(), rotary=(), layer_scales=(), **named), kinds


def _language_model(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the language model: those of `text_config` where they are nested.

    As in transformers the nested ones win over the same fields beside them, but for token ids and dtype, which belong
    to the whole.
    """
    nested = read.mapping("text_config", config.get("text_config"))
    if not nested:
        return dict(config)
    whole = ("bos_token_id", "eos_token_id", "dtype", "torch_dtype", "quantization_config")
    outer = {k: v for k, v in config.items() if not k.endswith("_config") or k in whole}
    fields = {**outer, **nested, "architectures": config.get("architectures")}
    for name in sorted(outer.keys() & nested.keys() - {"model_type", "architectures"}):
        order = (outer, nested) if name in whole else (nested, outer)
        homes = {id(nested): f"text_config.{name}", id(outer): name}
        fields[name] = read.settle({homes[id(home)]: home[name] for home in order})
    return fields


def _generic_names(config: dict[str, Any], declared: Architecture) -> dict[str, Any]:
    """The fields under their generic names, with the architecture's values for those that are left out."""
    fields = dict(config)
    for name, alias in declared.aliases.items():
        found = read.settle({alias: config.get(alias), name: config.get(name)})
        if found is not None:
            fields[name] = found
    for name, value in declared.defaults.items():
        if fields.get(name) is None:
            fields[name] = value
    return fields


def _positions(fields: dict[str, Any], rope: RopeConfig) -> int:
    """Positions of the model: those stated, times what its rotary embedding is stretched for."""
    stated = read.size(fields, "max_position_embeddings")
    if rope.kind == "yarn":
        return max(stated, round(rope.factor * rope.original_max_position_embeddings))
    return round(stated * rope.extension)


def _token_ids(
    name: str, fields: dict[str, Any], generation_config: dict[str, Any]
) -> tuple[int, ...]:
    """What generation_config.json says, else config.json."""
    if generation_config.get(name) is None:
        return read.token_ids(fields, name)
    try:
        return read.token_ids(generation_config, name)
    except ConfigError as error:
        raise ConfigError(f"generation_config.json: {error}") from error


def _head_dim(config: dict[str, Any], heads: int) -> int:
    hidden = read.size(config, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads} "
            "and head_dim is not given"
        )
    return read.size(config, "head_dim", default=hidden // heads)


def _dtype(config: dict[str, Any]) -> str:
    """`dtype` of transformers 5 wins over `torch_dtype`, as there."""

    def plain(name: str) -> Any:
        value = config.get(name) or None
        return value.removeprefix("torch.") if isinstance(value, str) else value

    name = read.settle({"dtype": plain("dtype"), "torch_dtype": plain("torch_dtype")}) or "float32"
    if name not in DTYPES:
        raise ConfigError(f"dtype = {name!r} is not supported (supported: {', '.join(DTYPES)})")
    return name
