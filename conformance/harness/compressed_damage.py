"""Damaged folders: everything that is missing, unknown, mis-shaped or contradicts something else.

Each kind of damage is a few lines of Python on what is written, or on what has been; the number that a
case draws picks among its choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from conformance.harness.compressed_cases import CompressedCase
from conformance.harness.core_cases import PROJECTIONS


@dataclass(frozen=True)
class Damage:
    """Lines that spoil a folder."""

    late: tuple[str, ...] = ()
    """On ``contents``, ``others`` and ``files``, before they are written."""
    after: tuple[str, ...] = ()
    """On what has been written."""
    named: str = ""
    """The path in the folder, or the weight, that the error must name."""


Damager = Callable[[CompressedCase], Damage]
DAMAGES: dict[str, Damager] = {}


def damage(damager: Damager) -> Damager:
    """Register a kind of damage by its function's name."""
    DAMAGES[damager.__name__] = damager
    return damager


def picked(case: CompressedCase, choices: list) -> object:
    """One of the choices, by the case's number."""
    return choices[case.which % len(choices)]


def place_of(case: CompressedCase) -> tuple[int, str]:
    """A layer and a projection."""
    layers = case.expert_layers
    return layers[case.which % len(layers)], PROJECTIONS[case.which // 7 % 3]


def content_of(case: CompressedCase) -> tuple[str, str]:
    """The path of a projection's file without its suffix, and Python for what is in it."""
    layer, projection = place_of(case)
    path = f"layer_{layer}/{projection}"
    return path, f"contents[{path!r}]"


def wrapper_of(case: CompressedCase) -> tuple[str, str]:
    """The same for one expert's wrapper."""
    path, content = content_of(case)
    return path, f"{content}['wrappers'][{case.which // 3 % case.experts}]"


FACTORS = ("U_in", "V_in", "U_out", "V_out")


def factor_of(case: CompressedCase) -> tuple[str, str]:
    """The same for one factor, or the core."""
    path, content = content_of(case)
    _, wrapper = wrapper_of(case)
    names = [f"{content}['core']", *(f"{wrapper}[{name!r}]" for name in FACTORS)]
    return path, names[case.which // 5 % 5]


# Layers and projections


@damage
def missing_layer(case: CompressedCase) -> Damage:
    """The folder of a layer that has experts is not there."""
    layer, _ = place_of(case)
    gone = f"contents = {{n: c for n, c in contents.items() if not n.startswith('layer_{layer}/')}}"
    small = f"files = {{n: c for n, c in files.items() if not n.startswith('layer_{layer}/')}}"
    return Damage((gone, small), named=f"layer_{layer}")


@damage
def extra_layer(case: CompressedCase) -> Damage:
    """There is a folder of a layer that is dense, or beyond the model."""
    layer, _ = place_of(case)
    other = picked(case, [case.layers, 99, *case.dense])
    lines = (
        f"contents |= {{n.replace('layer_{layer}/', 'layer_{other}/'): {{**c, 'layer_idx': {other}}} "
        f"for n, c in contents.items() if n.startswith('layer_{layer}/')}}",
        f"files |= {{n.replace('layer_{layer}/', 'layer_{other}/'): c "
        f"for n, c in files.items() if n.startswith('layer_{layer}/')}}",
    )
    return Damage(lines, named=f"layer_{other}")


@damage
def missing_projection(case: CompressedCase) -> Damage:
    """One projection of a layer has no file; there might be an original weight to fall back on."""
    path, content = content_of(case)
    return Damage((f"del {content}",), named=path)


@damage
def other_place(case: CompressedCase) -> Damage:
    """A ``.pt`` file says that it is of another layer or projection."""
    path, content = content_of(case)
    layer, _ = place_of(case)
    changes = [f"{content}['layer_idx'] = {layer + 1}", f"{content}['projection'] = 'w1'"]
    return Damage((str(picked(case, changes)),), named=path)


# Experts


@damage
def other_number_of_experts(case: CompressedCase) -> Damage:
    """A projection has an expert more or less than the model."""
    path, content = content_of(case)
    wrappers = f"{content}['wrappers']"
    more = case.which % 2
    edit = (
        f"{wrappers}.append({{k: t.clone() for k, t in {wrappers}[0].items()}})"
        if more
        else f"{wrappers}.pop()"
    )
    number = case.experts + (1 if more else -1)
    both = [f"{content}['metadata']['num_experts'] = {number}"]
    both += [f"files[{path + '_metadata.json'!r}]['num_experts'] = {number}"]
    return Damage((edit, *(both if case.which % 3 else ())), named=path)


@damage
def no_experts(case: CompressedCase) -> Damage:
    """A projection has a core and no wrappers at all."""
    path, content = content_of(case)
    return Damage((f"{content}['wrappers'].clear()",), named=path)


@damage
def missing_factor(case: CompressedCase) -> Damage:
    """One factor of one expert, or the core, is missing, or has another name."""
    path, content = content_of(case)
    _, wrapper = wrapper_of(case)
    name = FACTORS[case.which % 4]
    changes = [f"del {wrapper}[{name!r}]"]
    changes += [f"{wrapper}[{name.lower()!r}] = {wrapper}.pop({name!r})"]
    if case.format == "pt":
        changes += [f"del {content}['core']"]
    return Damage((changes[case.which // 4 % len(changes)],), named=path)


@damage
def unknown_factor(case: CompressedCase) -> Damage:
    """A wrapper has a factor that no form has, such as a scale."""
    path, wrapper = wrapper_of(case)
    return Damage((f"{wrapper}['scale'] = torch.ones(1)",), named=path)


@damage
def sides_exchanged(case: CompressedCase) -> Damage:
    """The factors of input and output are exchanged, which their shapes show."""
    path, w = wrapper_of(case)
    which = "UV"[case.which % 2]
    a, b = f"{w}['{which}_in']", f"{w}['{which}_out']"
    return Damage((f"{a}, {b} = {b}, {a}",), named=path)


@damage
def transposed(case: CompressedCase) -> Damage:
    """The core, or a factor, is stored as its transpose."""
    path, name = factor_of(case)
    return Damage((f"{name} = {name}.t().contiguous()",), named=path)


@damage
def other_shape(case: CompressedCase) -> Damage:
    """A tensor lacks a row, has an axis more, or is flat."""
    path, name = factor_of(case)
    changes = [f"{name}[1:].clone()", f"{name}[None].clone()", f"{name}.flatten()"]
    return Damage((f"{name} = {picked(case, changes)}",), named=path)


# Rank


@damage
def mixed_ranks(case: CompressedCase) -> Damage:
    """One expert has another rank than the others."""
    path, w = wrapper_of(case)
    line = f"{w} = {{k: torch.cat([t, t], 1) for k, t in {w}.items()}}"
    return Damage((line,), named=path)


@damage
def metadata_rank(case: CompressedCase) -> Damage:
    """A projection's metadata name another size than its tensors have."""
    path, content = content_of(case)
    name = ("rank", "num_experts", "d_in", "d_out")[case.which % 4]
    lines = [f"files[{path + '_metadata.json'!r}][{name!r}] += 1"]
    if case.format == "pt":
        lines.append(f"{content}['metadata'][{name!r}] += 1")
        lines = lines[case.which // 4 % 2 :][:1]
    return Damage(tuple(lines), named=path)


# Values


@damage
def not_finite(case: CompressedCase) -> Damage:
    """One element of a projection, or of another weight, is NaN or infinite."""
    value = ("nan", "inf", "-inf")[case.which % 3]
    path, name = factor_of(case)
    if case.which % 4 == 0:
        path, key = "non_moe_weights", [*case.other_shapes()][case.which // 4 % 9]
        name = f"others[{key!r}]"
    return Damage((f"{name}.view(-1)[1] = float({value!r})",), named=path)


@damage
def not_floating(case: CompressedCase) -> Damage:
    """A tensor of integers."""
    path, name = factor_of(case)
    dtype = ("int8", "int64", "bool")[case.which % 3]
    if case.which % 4 == 0:
        path, name = "non_moe_weights", "others['model.norm.weight']"
    return Damage((f"{name} = (100 * {name}).to(torch.{dtype})",), named=path)


# Other weights


def other_key(case: CompressedCase) -> str:
    """The name of a weight that is not of experts."""
    keys = [*case.other_shapes()]
    return keys[case.which // 2 % len(keys)]


@damage
def missing_others(case: CompressedCase) -> Damage:
    """``non_moe_weights`` is not there."""
    line = f"os.remove(f'{{source}}/non_moe_weights.{case.format}')"
    return Damage(after=(line,), named="non_moe_weights")


@damage
def missing_weight(case: CompressedCase) -> Damage:
    """One weight that is not of experts is missing."""
    return Damage((f"del others[{other_key(case)!r}]",), named=other_key(case))


@damage
def unknown_weight(case: CompressedCase) -> Damage:
    """``non_moe_weights`` has a weight that the model does not have."""
    layer = case.expert_layers[0]
    keys = [
        "model.layers.99.input_layernorm.weight",
        "model.norm.bias",
        f"model.layers.{layer}.{case.block}.experts.0.gate_proj.weight",
        f"model.layers.{layer}.{case.block}.shared_expert.gate_proj.weight",
    ]
    key = str(picked(case, keys))
    return Damage((f"others[{key!r}] = torch.ones(3)",), named=key)


@damage
def renamed_weight(case: CompressedCase) -> Damage:
    """A weight has another prefix, so that its own name is missing."""
    key = other_key(case)
    other = picked(case, ["module.", "_orig_mod.", "transformer."])
    return Damage((f"others[{other + key!r}] = others.pop({key!r})",), named=key)


@damage
def misshapen_weight(case: CompressedCase) -> Damage:
    """A weight that is not of experts has another shape."""
    key = other_key(case)
    name = f"others[{key!r}]"
    two = len(case.other_shapes()[key]) == 2
    changes = [f"{name}[1:].clone()", f"{name}[None].clone()"]
    changes += [f"{name}.t().contiguous()"] * two
    change = changes[case.which % len(changes)]
    if "t()" in change and len(set(case.other_shapes()[key])) == 1:
        change = changes[0]
    return Damage((f"{name} = {change}",), named=key)


# The small files


@damage
def layer_metadata(case: CompressedCase) -> Damage:
    """``compressed_metadata.json`` is missing, lacks an entry or says something else."""
    file = "files['compressed_metadata.json']"
    lines = [
        "del files['compressed_metadata.json']",
        f"{file}['compressed_layer_indices'].append({case.layers + 3})",
        f"{file}['compressed_layer_indices'].pop()",
        f"{file}['total_layers'] += 1",
        f"{file}['num_compressed_layers'] += 1",
        f"del {file}['compressed_layer_indices']",
    ]
    return Damage((str(picked(case, lines)),), named="compressed_metadata.json")


@damage
def no_config(case: CompressedCase) -> Damage:
    """``config.json`` is missing, is not JSON, or is of another architecture."""
    lines = [
        "os.remove(f'{source}/config.json')",
        "open(f'{source}/config.json', 'w').write('{\"model_type\"') and None",
        "open(f'{source}/config.json', 'w').write('[]') and None",
        "open(f'{source}/config.json', 'w').write('{\"model_type\": \"llama\"}') and None",
    ]
    return Damage(after=(str(picked(case, lines)),), named="config.json")


@damage
def contradictory_config(case: CompressedCase) -> Damage:
    """``config.json`` has another size, number of experts or of layers than the weights."""
    config, qwen = "files['config.json']", case.model == "qwen3_moe"
    experts = "num_experts" if qwen else "num_local_experts"
    inner = "moe_intermediate_size" if qwen else "intermediate_size"
    lines = [
        f"{config}[{experts!r}] += 1",
        f"{config}[{inner!r}] += 2",
        f"{config}['hidden_size'] += 2",
        f"{config}['num_hidden_layers'] += 1",
        f"{config}['num_hidden_layers'] -= 1",
        f"{config}['vocab_size'] += 1",
        f"{config}['num_experts_per_tok'] = {case.experts + 1}",
        f"del {config}['hidden_size']",
        f"{config}[{experts!r}] = 0",
    ]
    return Damage((str(picked(case, lines)),))


@damage
def contradictory_compression(case: CompressedCase) -> Damage:
    """``compression_config.json`` has another rank, or other projections, or is not JSON."""
    file = "files['compression_config.json']"
    lines = [
        f"{file}['rank'] += 1",
        f"{file}['num_experts'] += 1",
        f"{file}['projections'] = []",
        f"{file}['projections'] = ['gate_proj', 'up_proj']",
        f"{file}['projections'] = ['gate_proj', 'up_proj', 'down_proj', 'router']",
        f"{file}['projections'] = ['w1', 'w2', 'w3']",
        f"{file}['rank'] = 0",
        "files['compression_config.json'] = []",
    ]
    return Damage((str(picked(case, lines)),), named="compression_config")


@damage
def edited_statistics(case: CompressedCase) -> Damage:
    """``compression_statistics.yaml`` was edited by hand: other counts, rounded ratios."""
    file = "files['compression_statistics.yaml']"
    lines = [
        f"{file}['total_compression_ratio'] = 0.19",
        f"{file}['active_compression_ratio'] = 0.57",
        f"{file}['total_params_compressed'] += 1",
        f"{file}['total_params_original'] *= 2",
        f"{file}['per_layer_stats'][0]['rank'] += 1",
        f"{file}['per_layer_stats'].pop()",
        f"{file}['per_layer_stats'].append(dict({file}['per_layer_stats'][0]))",
        "files['compression_statistics.yaml'] = {}",
    ]
    return Damage((str(picked(case, lines)),), named="compression_statistics.yaml")


# Bytes


def weights_file(case: CompressedCase) -> str:
    """One of the files of weights."""
    path, _ = content_of(case)
    return f"{path if case.which % 3 else 'non_moe_weights'}.{case.format}"


@damage
def truncated(case: CompressedCase) -> Damage:
    """A file of weights ends too early."""
    name = weights_file(case)
    lengths = ["0", "7", "len(data) // 2", "len(data) - 1", f"len(data) * {case.which} // 1000"]
    lines = (
        f"data = open(f'{{source}}/{name}', 'rb').read()",
        f"open(f'{{source}}/{name}', 'wb').write(data[:{picked(case, lengths)}]) and None",
    )
    return Damage(after=lines, named=name)


@damage
def flipped_bit(case: CompressedCase) -> Damage:
    """One bit of a tensor in a ``.pt`` file is not what was written: its checksum says so."""
    path, content = content_of(case)
    lines = (
        f"data = bytearray(open(f'{{source}}/{path}.pt', 'rb').read())",
        f"at = data.find({content}['core'].numpy().tobytes()) + {case.which % 200}",
        f"data[at] ^= {1 << case.which % 8}",
        f"open(f'{{source}}/{path}.pt', 'wb').write(data) and None",
    )
    return Damage(after=lines, named=f"{path}.pt")


@damage
def pickled_code(case: CompressedCase) -> Damage:
    """A ``.pt`` file whose pickle would create a file if it were executed."""
    path, content = content_of(case)
    evil = "evil = type('E', (), {'__reduce__': lambda s: (open, (source + '.executed', 'w'))})()"
    if case.which % 2:
        write = "torch.save(others | {'extra': evil}, f'{source}/non_moe_weights.pt')"
        return Damage(after=(evil, write), named="non_moe_weights.pt")
    write = f"torch.save({content} | {{'extra': evil}}, f'{{source}}/{path}.pt')"
    return Damage(after=(evil, write), named=f"{path}.pt")


@damage
def not_a_projection(case: CompressedCase) -> Damage:
    """A file holds something else than a projection."""
    path, content = content_of(case)
    file = f"f'{{source}}/{path}.{case.format}'"
    if case.format == "pt":
        held = [f"[{content}]", f"{content}['core']", "{}", f"{content}['wrappers']"]
        line = f"torch.save({picked(case, held)}, {file})"
    else:
        held = ["{'weight': torch.ones(3, 4)}", "{}"]
        line = f"safetensors.torch.save_file({picked(case, held)}, {file})"
    return Damage(after=(line,), named=path)


@damage
def both_formats(case: CompressedCase) -> Damage:
    """Two files of the same weights lie side by side, in the two formats."""
    path, content = content_of(case)
    other = "safetensors" if case.format == "pt" else "pt"
    if case.which % 2:
        path, content = "non_moe_weights", "others"
    tensors = "{'core': torch.ones(2, 2)}"
    write = f"torch.save({content}, f'{{source}}/{path}.pt')"
    if other == "safetensors":
        write = f"safetensors.torch.save_file({tensors}, f'{{source}}/{path}.safetensors')"
    return Damage(after=(write,), named=path.rpartition("/")[0] or path)


@damage
def no_folder(case: CompressedCase) -> Damage:
    """The path is of nothing, of a file, or of an empty folder."""
    lines = [
        "import shutil; shutil.rmtree(source)",
        "import shutil; shutil.rmtree(source); open(source, 'w').write('{}') and None",
        "import shutil; shutil.rmtree(source); os.mkdir(source)",
    ]
    return Damage(after=(str(picked(case, lines)),), named="model")
