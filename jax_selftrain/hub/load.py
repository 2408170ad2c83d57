"""Load models onto a mesh, and convert between formats."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jax_selftrain.config import ConvertConfig, yaml_io
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import ShardingRules, make_sharding_rules, shard_host_array
from jax_selftrain.errors import InputError
from jax_selftrain.hub import orbax_io
from jax_selftrain.hub.families import FAMILIES
from jax_selftrain.hub.model_folder import ExportSpec, save_model
from jax_selftrain.hub.model_ref import CONFIG, PARAMS, ModelRef, Ref, open_model
from jax_selftrain.hub.safetensors_io import load_params
from jax_selftrain.hub.tokenizer import SpecialTokens
from jax_selftrain.models import DecoderConfig, Params, abstract_params, axis_sizes, forward, unembed


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model on a mesh, ready to be sampled, scored or trained."""

    source: ModelRef
    """The model that config and tokenizer come from."""
    params: Params = field(repr=False)
    """Nested dict of arrays, see `jax_selftrain.models`; sharded as `abstract_params`."""
    sharding_rules: ShardingRules
    compute_dtype: jnp.dtype
    """Dtype of parameters and matmul operands."""
    export: ExportSpec | None = field(default=None, repr=False)
    """Tensors of `source`; None: the parameters are not those of `source`."""

    @property
    def config(self) -> DecoderConfig:
        """The architecture."""
        return self.source.config

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer, or None where the model has none."""
        return self.source.tokenizer if self.source.has_tokenizer else None

    @property
    def special_tokens(self) -> SpecialTokens:
        """Start and stop ids."""
        return self.source.special_tokens

    def logits(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
        """Compute fp32 logits at every position, on the host.

        Raises:
          InputError: an id is outside the vocabulary, or T is longer than the model's positions.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"tokens should be whole numbers [batch, time], not {tokens.dtype} {tokens.shape}")
        if tokens.shape[1] > (limit := self.config.max_positions):
            raise InputError(f"{self.source.ref}: {tokens.shape[1]} tokens are more than the model's {limit} positions")
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < (size := self.config.vocab_size)):
            raise InputError(f"{self.source.ref}: knows ids from 0 to {size - 1}, not {tokens.min()} to {tokens.max()}")
        rows = len(tokens)
        padded = np.zeros((rows + -rows % self.sharding_rules.data_parallelism, tokens.shape[1]), np.int32)
        padded[:rows] = tokens
        with mesh_context(self.sharding_rules.mesh):
            batch = shard_host_array(self.sharding_rules, padded, ("batch", None))
            return np.asarray(_logits(self.config, self.sharding_rules, self.compute_dtype, self.params, batch))[:rows]

    def save_pretrained(self, folder: Ref) -> Path:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` open.

        Every tensor gets the dtype it came with, or that of the parameters where that is narrower.
        """
        export, ours, metadata = self.export, self.compute_dtype, {"made_by": "save_pretrained"}
        if export is not None:
            tensors = {
                name: stored if np.dtype(stored).itemsize <= ours.itemsize else ours.name
                for name, stored in export.tensors.items()
            }
            export = export if tensors == export.tensors else export.cast(tensors)
        return save_model(folder, self.params, source=self.source, export=export, metadata=metadata)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _logits(
    config: DecoderConfig, rules: ShardingRules, dtype: jnp.dtype, params: Params, tokens: jax.Array
) -> jax.Array:
    hidden = forward(config, rules, params, tokens, compute_dtype=dtype)
    logits = unembed(config, rules, params, hidden, compute_dtype=dtype)
    return jax.reshard(logits, rules.sharding((None, None, None)))


def load_model(
    ref: Ref | ModelRef, mesh: Mesh | str | None = None, dtype: str = "float32", *, preset: str = "tensor"
) -> LoadedModel:
    """Load a model onto a mesh.

    Args:
      ref: a model folder, a hub id (`org/name`, `org/name@revision`), a RUN folder, or what `open_model` returned.
      mesh: a mesh from `make_mesh`, its description (`data=4,model=2`), or None for all devices on `data`.
      dtype: `float32` or `bfloat16`, of parameters and matmul operands.
      preset: sharding of parameters: `replicated`, `fsdp` or `tensor`.

    Raises:
      InputError: the reference, the config, the weights or the tokenizer cannot be used; says which and why.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype!r} is unknown; choose float32 or bfloat16")
    source = open_model(ref)
    mesh = mesh if isinstance(mesh, Mesh) else make_mesh(mesh or "")
    rules = make_sharding_rules(preset, mesh, axis_sizes(source.config))
    if source.has_tokenizer:
        _ = source.special_tokens  # refuses a tokenizer of another model before weights are read
    params, export = read_params(source, rules, np.dtype(dtype))
    return LoadedModel(source, params, rules, np.dtype(dtype), export)


def convert(config: ConvertConfig) -> Path:
    """Write a model as safetensors (`hf`) or an Orbax tree (`flax`).

    Raises:
      InputError: the model cannot be read, a key to ignore is not in its config, a weight overflows in `--dtype`, or
        the folder exists already or cannot be written.
    """
    yaml_io.require(config)
    source = open_model(config.source).without_keys(config.ignore_config_keys)
    dtype = None if config.dtype == "keep" else np.dtype(config.dtype)
    rules = storage_sharding(
        source.config, preset="replicated" if source.config.hidden_size % jax.device_count() else "fsdp"
    )
    params, export = read_params(source, rules, dtype)
    if dtype is not None:
        export = export.cast(dict.fromkeys(export.tensors, dtype.name))
        with mesh_context(rules.mesh):
            overflow = orbax_io.find_nonfinite(params)
        if overflow:
            raise InputError(f"--dtype {dtype.name}: {overflow} would be infinite; convert to bfloat16 or float32")
    metadata: dict[str, Any] = {"made_by": "convert", "dtype": config.dtype}
    if config.ignore_config_keys:
        metadata["ignored_config_keys"] = list(config.ignore_config_keys)
    return save_model(config.out, params, source=source, export=export, metadata=metadata, format=config.format)


def storage_sharding(config: DecoderConfig, mesh: str = "", preset: str = "replicated") -> ShardingRules:
    """Shard parameters that are only read, changed and written.

    One process without a mesh keeps them on a CPU device.
    """
    if mesh or jax.process_count() > 1:
        return make_sharding_rules(preset, make_mesh(mesh), axis_sizes(config))
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        device = jax.local_devices()[0]
    return make_sharding_rules("replicated", make_mesh("", [device]), axis_sizes(config))


def read_params(source: ModelRef, rules: ShardingRules, dtype: np.dtype | None) -> tuple[Params, ExportSpec]:
    """Verify and read parameters in `dtype` (None: as stored)."""
    if not source.is_orbax:
        source.verify_weights()
        family = FAMILIES[source.raw_config["model_type"]]
        params, tensors, dropped = load_params(source.weights_folder, family, source.config, rules, dtype)
        return params, ExportSpec(source.raw_config, tensors, dropped)
    stored = orbax_io.read_tree_manifest(source.folder / PARAMS)["arrays"]
    abstract = flatten_dict(abstract_params(source.config, rules=rules), sep="/")
    if stored.keys() != abstract.keys():
        raise InputError(f"{source.folder}: {PARAMS} and {CONFIG} describe different models; make the folder again")
    for name, leaf in abstract.items():
        abstract[name] = leaf.update(dtype=dtype or np.dtype(stored[name]["dtype"]))
    params = orbax_io.load_tree(source.folder / PARAMS, unflatten_dict(abstract, sep="/"))
    with mesh_context(rules.mesh):
        nonfinite = orbax_io.find_nonfinite(params)
    if nonfinite:
        raise InputError(f"{source.folder}: {nonfinite} holds NaN or infinity; the model is broken, so use another one")
    return params, ExportSpec(source.raw_config, source.manifest["tensors"], source.manifest["dropped"])
