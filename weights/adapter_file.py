"""An adapter in a safetensors file: its tensors, and as metadata its method with its settings and what base it is for.

    adapter          JSON: {"method": "sorsa", "rank": 16, ...}, the arguments that attach would need to do it again
    base_name, base_sha256      name and identity of the base (see base_model.identity)
"""
import inspect
import json

import adapter
from methods import METHODS, arguments
from weights.files import AGAIN, fault, json_object
from weights.safetensors import read_safetensors, write_safetensors

KINDS = {int: ("a whole number", lambda value: type(value) is int and -1 << 63 <= value < 1 << 63),
         float: ("a number", lambda value: type(value) in (int, float) and -1e30 < value < 1e30),  # which fp32 can hold
         bool: ("true or false", lambda value: isinstance(value, bool)),
         str: ("a text", lambda value: isinstance(value, str)),
         list: ("a list of texts", lambda value: isinstance(value, list) and all(map(KINDS[str][1], value))),
         dict: ("a map of numbers",
                lambda value: isinstance(value, dict) and all(map(KINDS[float][1], value.values())))}


def save(model, path, base_name="", base_sha256=""):
    """Write the attached adapter. ValueError where nothing is attached."""
    if not hasattr(model, "adapter_config"):
        raise ValueError("nothing is attached to this model: there is no adapter to save (or it has been merged)")
    metadata = {"adapter": json.dumps(model.adapter_config), "base_name": base_name, "base_sha256": base_sha256}
    write_safetensors(path, adapter.state(model), metadata)


def load(model, path, base_sha256="", force=False):
    """Attach the method named in the file to a fresh base `model` and fill in its tensors. Returns the config.

    Raises ValueError if the file is no adapter, if it belongs to another base (both identities known and different;
    `force` takes it all the same), or if its tensors are not exactly those that the method has on this model.
    """
    tensors, config, name, sha256 = read(path)
    if sha256 and base_sha256 and sha256 != base_sha256 and not force:
        raise fault(path, f"this adapter was trained on another base model ({name}, sha256 {sha256[:12]}...; the one "
                          f"given has {base_sha256[:12]}...: other weights, numbers in config.json or tokenizer)",
                    "load that base, or force it on this one (--force)")
    attach_saved(model, path, tensors, config, force)
    return config


def read(path):
    """(tensors, config, base_name, base_sha256) of an adapter file; ValueError if it is not one."""
    tensors, metadata = read_safetensors(path)
    return tensors, checked_config(path, metadata), metadata.get("base_name", ""), metadata.get("base_sha256", "")


def checked_config(path, metadata):
    """The method and its settings in the metadata of the file `path`; ValueError if they are none."""
    if "adapter" not in metadata:
        raise ValueError(f"{path}: not an adapter file: its metadata has no 'adapter' entry")
    config = json_object(metadata["adapter"], path, "the 'adapter' metadata is ")
    check_config(path, config)
    return config


def check_config(path, config, fix=None):
    """ValueError unless `config`, as it is in a file after JSON, names a method and arguments that its attach takes.
    `fix` is the message's remedy, where it is not that of a file."""
    if not isinstance(config.get("method"), str) or config["method"] not in METHODS:
        raise fault(path, f"unknown method {config.get('method')!r}", fix or f"known: {', '.join(METHODS)}")
    known = arguments(METHODS[config["method"]].attach)
    for key, value in config.items():
        if key == "method":
            continue
        if key not in known:
            raise fault(path, f"{config['method']} has no setting {key}", fix or "was it written by another version?")
        kind, is_kind = KINDS[known[key].kind]
        if not is_kind(value) and not (value is None and known[key].default is None):
            raise fault(path, f"the setting {key} is {value!r}, expected {kind}", fix or AGAIN)


def check_recorded(method, model):
    """ValueError unless attach has recorded what it takes to do it again, without which a file could not be loaded."""
    config = json.loads(json.dumps(getattr(model, "adapter_config", {})))
    where, fix = f"{method}'s attach", (f"end attach with adapter.record(model, {method!r}, ...) and its own arguments, "
                                        "each with a default, and an annotation where that is None (int, float, bool, "
                                        "str, list, dict or Literal)")
    check_config(where, config, fix)
    if config["method"] != method:
        raise fault(where, f"records the name {config['method']!r}", fix)
    lacking = arguments(METHODS[method].attach).keys() - config.keys()
    if lacking:
        raise fault(where, f"does not record {', '.join(sorted(lacking))}", fix)


def attach_saved(model, path, tensors, config, force=False):
    """Attach the method of `config` to a fresh base `model` and fill in `tensors`, both read from the file `path`.

    Raises ValueError if the tensors are not exactly those that the method has on this model.
    """
    attach = METHODS[config["method"]].attach
    checks = ("method", "norms") if force else ("method",)  # by its norms SARA knows its base
    settings = {key: value for key, value in config.items() if key not in checks}
    if "saved" in inspect.signature(attach).parameters:  # it starts from what the file holds, without an SVD
        settings["saved"] = tensors
    try:
        attach(model, **settings)
        adapter.fill(model, tensors)
    except ValueError as error:
        raise fault(path, str(error), "load it on the base it was made for") from None
