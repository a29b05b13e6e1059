"""What stories of watchers are made of: functions whose source is printed where a story fails.

They use torch and safetensors, and nothing of this package. A story's lines define ``directory``,
``results`` and ``log`` (paths), and ``acts``.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import signal
import sys
import warnings

import safetensors.torch
import torch

directory = results = log = ""
acts: dict = {}
"""What happens in an evaluation, by the checkpoint's name: functions, one for each time."""
written: dict = {}
"""The files that make a checkpoint whole, by its name: their contents by path."""

CONFIG = {"model_type": "qwen3_moe", "hidden_size": 24}
WEIGHTS = {"model.embed_tokens.weight": (7, 4), "model.norm.weight": (5,), "lm_head.weight": (3, 6)}
LAYERS = (0, 10)
FACTORS = {"core": (3, 5), "wrappers.0.U_in": (5, 1), "wrappers.0.V_in": (5, 1)}
FACTORS |= {"wrappers.0.U_out": (3, 1), "wrappers.0.V_out": (3, 1)}


def coded(shapes, code):
    """Tensors of which every element says which checkpoint it is of, and its own place."""
    made = {}
    for number, (name, shape) in enumerate(shapes.items()):
        place = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        made[name] = place + 100 * number + 10_000 * code
    return made


def single(code):
    """The files of a checkpoint by path, mappings for JSON and tensors: all weights in one file."""
    return {"config.json": CONFIG, "model.safetensors": coded(WEIGHTS, code)}


def sharded(code):
    """The same in a file for each tensor, with an index."""
    tensors, places = coded(WEIGHTS, code), {}
    files = {"config.json": CONFIG}
    for number, name in enumerate(tensors, start=1):
        places[name] = f"model-{number:05}-of-00003.safetensors"
        files[places[name]] = {name: tensors[name]}
    return files | {"model.safetensors.index.json": {"metadata": {}, "weight_map": places}}


def compressed_pt(code):
    """The files of a compressed model in the format with ``.pt``."""
    return compressed(code, "pt")


def compressed(code, suffix="safetensors"):
    """The files of a compressed model."""
    named = {"compressed_layer_indices": [*LAYERS], "num_compressed_layers": 2, "total_layers": 12}
    files = {"config.json": CONFIG, "compressed_metadata.json": named}
    files[f"non_moe_weights.{suffix}"] = coded(WEIGHTS, code)
    for path in [f"layer_{i}/{p}_proj" for i in LAYERS for p in ("gate", "up", "down")]:
        tensors = coded(FACTORS, code)
        files[f"{path}.{suffix}"] = nested(tensors) if suffix == "pt" else tensors
    return files


def nested(tensors):
    """The tensors of a projection as the format with ``.pt`` nests them."""
    inner = {name.split(".")[2]: t for name, t in tensors.items() if name != "core"}
    return {"core": tensors["core"], "wrappers": [inner]}


def put(path, content):
    """Write one file of a checkpoint."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if path.endswith(".json"):
        with open(path, "w") as file:
            json.dump(content, file)
    elif path.endswith(".pt"):
        torch.save(content, path)
    else:
        safetensors.torch.save_file(content, path)


def write(name, layout, code, without=()):
    """Write a checkpoint anew, without some of its files; later ones have later times."""
    folder = os.path.join(directory, name)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    written[name] = layout(code)
    for path, content in written[name].items():
        if path not in without:
            put(os.path.join(folder, path), content)
            os.utime(os.path.join(folder, path), (10**9 + code, 10**9 + code))


def complete(name):
    """Write the files of a checkpoint that are not there, or not whole."""
    for path, content in written[name].items():
        put(os.path.join(directory, name, path), content)


def cut(name, path, length):
    """Leave only the first bytes of a file; a negative length is counted from its end."""
    path = os.path.join(directory, name, path)
    os.truncate(path, length if length >= 0 else os.path.getsize(path) + length)


def remove(name):
    """Remove a checkpoint, as a trainer does that keeps only the latest."""
    shutil.rmtree(os.path.join(directory, name))


def read(path):
    """The tensors of a file; raises for one that is not whole."""
    if path.endswith(".json"):
        with open(path) as file:
            json.load(file)
        return []
    if path.endswith(".safetensors"):
        return [*safetensors.torch.load_file(path).values()]
    content = torch.load(path, weights_only=True)
    return [*content.pop("wrappers", [{}])[0].values(), *content.values()]


def code_of(folder):
    """Which checkpoint a folder holds; raises for one that is not whole, or mixed of two."""
    paths = [os.path.join(folder, p) for p in written[os.path.basename(os.path.realpath(folder))]]
    (code,) = {int(c) for path in paths for each in read(path) for c in (each // 10_000).flatten()}
    return code


def metrics_of(code):
    """What the evaluation of a checkpoint gives."""
    return {"loss": 1 / (code + 2), "tokens": 7 * code + 2**60}


def evaluate(path):
    """Evaluate a checkpoint; a line of the log says which was shown, and what it held."""
    name = os.path.basename(os.path.normpath(path))
    try:
        code = code_of(path)
    except Exception as error:
        code = f"not whole: {type(error).__name__}"
    line = {"name": name, "code": code, "path": repr(path)}
    with open(log, "a") as file:
        file.write(json.dumps(line) + "\n")
    found = acts[name].pop(0)() if acts.get(name) else None
    return metrics_of(code) if found is None else found


def raising(error):
    """An act that raises."""

    def act():
        raise error

    return act


def rewrite(encoded):
    """Write the results as another watcher has: other entries, other spaces, other order."""
    with open(results) as file:
        lines = [json.loads(line) for line in file]
    with open(results, "w", newline="\n") as file:
        file.writelines(encoded(line) + "\n" for line in lines)


def change_one(name, number):
    """Add 1 to one element of one file of a checkpoint, and leave its length as it is."""
    files = {path: each for path, each in written[name].items() if ".json" not in path}
    path = sorted(files)[number % len(files)]
    content = copy.deepcopy(files[path])
    tensors = content["wrappers"][0] if "wrappers" in content else content
    tensors[sorted(tensors)[number % len(tensors)]].view(-1)[-1] += 1
    put(os.path.join(directory, name, path), content)
    os.utime(os.path.join(directory, name, path), (10**9 + 5000, 10**9 + 5000))


def tear(length):
    """Break the last line of the results off after so many bytes."""
    with open(results, "rb") as file:
        content = file.read()
    begin = content.rfind(b"\n", 0, len(content) - 1) + 1
    os.truncate(results, begin + length)


def in_children(number, act):
    """Do something in so many processes at once; the largest of their exit statuses."""
    return max(map(ended, [started(act) for _ in range(number)]))


def in_child(act):
    """Do something in a process of its own; its exit status, 0 if it came to its end."""
    return ended(started(act))


def started(act):
    """A process that does something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        status = 66
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return child


def ended(child):
    """The exit status of a process, when it has ended."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


def dying_at(number, act):
    """An act that ends its process at the change of files with this number, from 0.

    Files are opened, and so made or emptied, before it ends; all else is not done any more.
    """

    def hook(event, arguments):
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & writing
        changes = event in ("os.rename", "os.remove", "os.truncate", "os.mkdir", "os.link")
        if arguments and arguments[0] != log and (opens or changes or event == "fcntl.flock"):
            seen.append(event)
            if len(seen) == number + 1:
                if opens and isinstance(arguments[0], (str, bytes)):
                    os.open(arguments[0], arguments[2])
                os._exit(77)

    seen = []

    def dying():
        sys.addaudithook(hook)
        act()

    return dying


def dying_in_write(length):
    """An act after which the process is killed once the results are so many bytes longer."""

    def act():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        there = os.path.getsize(results) if os.path.exists(results) else 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (there + length, resource.RLIM_INFINITY))

    return act
