"""The verbs every method shares, and nothing of any method: find, freeze, replace, count, merge, save, load.

A method is a module with `attach(model, ...)`, which works in place on any torch model that has `nn.Linear` modules
with the target names, and leaves `requires_grad` True exactly on what the method trains. Its layers derive from
`AdaptedLinear`: the frozen `weight` (and `bias`) stay under their old names, so base checkpoints keep their keys, and

    layer.forward(x)       the paper's equation, which never builds delta() while training
    layer.factors()        the matrices that forward multiplies by, beside `weight`
    layer.delta()          (out, in), what forward adds to `weight`
    layer.lora_factors()   (down (k, in), up (out, k)): up @ down is the change against the ORIGINAL weight
    layer.unmergeable      None, or why no matrix equals the change (Mo-SARA); delta and lora_factors then raise

What several layers use together (LoTR, CoRA) is registered once, on the model, in a `Shared`.
To use a method elsewhere, copy its file, this one and tensorfile.py.
"""
import contextlib
import importlib
import inspect
import json
import math
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F

from tensorfile import fault, json_object, read_safetensors, write_safetensors

# Which file teaches which method, and how its functions end there: mosara is attached by sara.attach_mosara.
METHODS = {"full": ("full", ""), "lora": ("lora", ""), "pissa": ("pissa", ""), "sorsa": ("sorsa", ""),
           "sara": ("sara", ""), "mosara": ("sara", "_mosara"), "cora": ("cora", ""), "cora-init": ("cora", "_init"),
           "lotr": ("lotr", "")}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRankSum(torch.autograd.Function):
    """x W^T + b + (x down^T) up^T for x (n, in), down (k, in), up (out, k), each sum made in place of its first term.

    These sums are the width of the model and the products behind them thin, so that writing and reading them is what a
    thin adapter costs: left to itself, autograd would keep memory for each product and for each sum. With g = dL/dy

        dL/dx = g W + (g up) down        dL/d down = (g up)^T x        dL/d up = g^T (x down^T)
    """

    @staticmethod
    def forward(ctx, x, weight, bias, down, up):
        low = x @ down.T  # (n, k)
        ctx.save_for_backward(x, weight, down, up, low)
        return F.linear(x, weight, bias).addmm_(low, up.T)  # (n, out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, down, up, low = ctx.saved_tensors
        d_low = g @ up  # (n, k)
        of_x, of_weight, of_bias, of_down, of_up = ctx.needs_input_grad
        return ((g @ weight).addmm_(d_low, down) if of_x else None, g.T @ x if of_weight else None,
                g.sum(0) if of_bias else None, d_low.T @ x if of_down else None, g.T @ low if of_up else None)


class AdaptedLinear(nn.Module):
    """The `nn.Linear` it replaces, frozen: the same `weight` (out, in) and `bias` (out,) tensors, no copy made."""

    unmergeable = None

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)

    def base(self, x):
        """x W^T + b."""
        return F.linear(x, self.weight, self.bias)

    def plus(self, x, down, up):
        """x W^T + b + (x down^T) up^T, (..., out), for x (..., in), down (k, in), up (out, k), cast to x's dtype."""
        down, up = down.to(x), up.to(x)
        if torch.is_autocast_enabled(x.device.type):  # which chooses dtypes product by product
            return self.base(x) + (x @ down.T) @ up.T
        y = LowRankSum.apply(x.reshape(-1, self.in_features), self.weight, self.bias, down, up)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        trained = ", ".join(f"{name} {tuple(p.shape)}" for name, p in self.named_parameters() if p.requires_grad)
        return f"in_features={self.in_features}, out_features={self.out_features}, trains: {trained}"


class Shared(nn.Module):
    """Modules that own what groups of layers share, {key of the group (no dots): module}.

    It is registered once, on the model, and its members are not registered in the layers, which keep theirs in a tuple:
    the state dict, the optimizer and a parameter count then see each tensor once, and a layer still finds it after the
    model has been moved, cast or deep-copied, which replaces tensors but not modules.
    """

    def __init__(self, groups):
        super().__init__()
        for key, group in groups.items():
            self.add_module(key, group)

    def forward(self, x):
        """x, as an nn.Sequential calls every module that is registered on it."""
        return x


def method_module(method):
    """The module of a method's name; ValueError lists the names there are."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    return importlib.import_module(METHODS[method][0])


def method_function(method, verb):
    """The function that does `verb` ("attach" or "fit") for a method; None where it has none."""
    return getattr(method_module(method), verb + METHODS[method][1], None)


# ---- attaching ------------------------------------------------------------------------------------------------------

def find_linears(model, targets, rank=None):
    """[(name, nn.Linear)] in module order: those whose last name component is one of `targets`, exactly.

    The default TARGETS stand for those of the seven that the model has (GPT-2 has no gate_proj).

    Raises ValueError, before anything has changed, if a method is already attached, if a target matches nothing or a
    weight that another module uses too (a head tied to the embedding), or if `rank` is given and is not in
    1 .. min(out, in) of every match.
    """
    if hasattr(model, "adapter_config") or adapted_layers(model):
        method = getattr(model, "adapter_config", {}).get("method", "a method")
        raise ValueError(f"{method} is already attached to this model: "
                         "merge it with adapter.merge(model), or start from a fresh base")
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name.rpartition(".")[2] for name, _ in linears]
    if tuple(targets) == TARGETS and set(TARGETS) & set(names):
        targets = [target for target in TARGETS if target in names]
    for target in targets:
        if target not in names:
            raise ValueError(f"target {target!r} matches no linear layer: this model has "
                             f"{', '.join(dict.fromkeys(names))}")
    found = [(name, linear) for (name, linear), last in zip(linears, names) if last in targets]
    users = Counter(id(getattr(module, "weight", None)) for module in model.modules())
    for name, linear in found:
        if users[id(linear.weight)] > 1:
            raise ValueError(f"{name} shares its weight with another module: adapting the one would change the other")
    if rank is not None:
        if not found:
            raise ValueError("no targets given: name the linear layers to adapt, as in targets=['q_proj', 'v_proj']")
        name, smallest = min(((n, min(m.weight.shape)) for n, m in found), key=lambda pair: pair[1])
        if not 1 <= rank <= smallest:
            raise ValueError(f"rank {rank} is out of range: it must be 1 .. {smallest}, the smaller side of {name}")
    return found


def freeze(model):
    """Nothing of the base trains: frozen before the forward pass, a linear neither saves its input nor computes dW."""
    model.requires_grad_(False)
    model.base_keys = frozenset(model.state_dict())  # what attach adds to these is what an adapter file holds


def replace(model, name, layer):
    """Put `layer` in the place of the module called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def record(model, method, **config):
    """Remember which method was attached, with the arguments that `attach` would need to do it again."""
    model.adapter_config = {"method": method, **config}


def adapted_layers(model):
    """[(name, layer)] of every layer that a method has put in."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]


def grouped(linears, key):
    """{key(name, linear): [(name, linear)]}, in module order."""
    groups = {}
    for name, linear in linears:
        groups.setdefault(key(name, linear), []).append((name, linear))
    return groups


def nearest_rank(linears, params, count):
    """{"rank": r} for the r that all `linears` allow and whose count(r) comes nearest to `params`."""
    limit = min(min(linear.weight.shape) for _, linear in linears)
    return {"rank": min(range(1, limit + 1), key=lambda rank: abs(count(rank) - params))}


def uniform_factor(rank, inner, generator):
    """LoRA's A (rank, in) at the start: uniform in +-1/sqrt(in), drawn on the CPU."""
    return (2 * torch.rand(rank, inner, generator=generator) - 1) * inner ** -0.5


# ---- singular vectors -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def full_precision(device_type):
    """No autocast and no TF32 inside: both would lift rounding from 1e-7 to 1e-3. What was set is set again after."""
    settings = [(torch.backends.cuda.matmul, "allow_tf32", False)]
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later, where the two APIs do not mix
        backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        settings = [(backend, "fp32_precision", "ieee") for backend in backends]
    before = [getattr(owner, name) for owner, name, _ in settings]
    for owner, name, value in settings:
        setattr(owner, name, value)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for (owner, name, _), value in zip(settings, before):
            setattr(owner, name, value)


@torch.no_grad()
def principal_triplets(weight, rank, svd="gram"):
    """The `rank` leading singular triplets of weight (out, in): U (out, r), S (r,) descending, Vt (r, in), all fp32.

    svd="exact"  economy SVD in fp32.
    svd="gram"   the same to fp32's accuracy, several times faster, by eigenvectors of the smaller of W W^T and W^T W. A
                 numerically rank-deficient W falls back to "exact".
    The sign that an SVD leaves free is fixed: the entry of largest magnitude in each row of Vt is positive.
    """
    if svd not in ("exact", "gram"):
        raise ValueError(f"unknown svd {svd!r}: choose exact or gram")
    with full_precision(weight.device.type):
        U = S = Vt = None
        if svd == "gram":
            wide = weight.shape[0] <= weight.shape[1]
            U, S, Vt = _triplets_from_gram(weight if wide else weight.T, rank)
            U, Vt = (U, Vt) if wide else (Vt.T, U.T)
        if U is None or not S[-1] > 1e-5 * S[0]:
            U, S, Vt = torch.linalg.svd(weight.float(), full_matrices=False)
            U, S, Vt = U[:, :rank], S[:rank], Vt[:rank]
    Vt, sign = fix_signs(Vt)
    return (U * sign.T).float().contiguous(), S.float().contiguous(), Vt.float().contiguous()


def fix_signs(Vt):
    """(rows of Vt turned so that the entry of largest magnitude in each is positive, the signs (r, 1) that do it)."""
    largest = Vt.gather(1, Vt.abs().argmax(dim=1, keepdim=True))  # (r, 1)
    sign = torch.where(largest < 0, -1.0, 1.0).to(Vt)
    return Vt * sign, sign


def _triplets_from_gram(W, rank):
    """U, S, Vt in fp64 of a W (rows, columns) that is not tall: W W^T = U S^2 U^T.

    The eigenvectors are found in fp32, a few more than asked for: the space they span is right to the square of their
    error. In that space the SVD of W is a small one, and done in fp64 (Rayleigh-Ritz).
    """
    _, vectors = torch.linalg.eigh(W.float() @ W.float().T)  # ascending
    Q = torch.linalg.qr(vectors[:, -(rank + 8):].double()).Q  # (rows, r + 8)
    U, S, Vt = torch.linalg.svd(Q.T @ W.double(), full_matrices=False)  # (r + 8, r + 8), (r + 8,), (r + 8, columns)
    return Q @ U[:, :rank], S[:rank], Vt[:rank]


@torch.no_grad()
def subtract(weight, delta):
    """weight <- weight - delta in place: summed in fp32, rounded once to the weight's dtype."""
    with full_precision(weight.device.type):
        weight.copy_(weight.float() - delta.float())


def saved_tensor(saved, name, shape):
    """A copy of the tensor called `name` of an adapter file's tensors; ValueError unless it is there in the expected
    shape. (A copy: `load` writes what was trained into the factors that start from it.)"""
    if name not in saved:
        raise ValueError(f"the adapter file has no tensor {name}: it does not fit this model, or was cut off")
    if tuple(saved[name].shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(saved[name].shape)} in the adapter file, expected {tuple(shape)}")
    return saved[name].clone()


# ---- counting -------------------------------------------------------------------------------------------------------

def trainable(model):
    """{name: Parameter} of what trains, each tensor once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_table(model):
    """Lines of text: what trains, a line per kind of module (equal names but for layer numbers, equal shapes)."""
    modules = {}
    for name, parameter in trainable(model).items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = parameter
    kinds = {}
    for module, parameters in modules.items():
        kind = ".".join(part for part in module.split(".") if not part.isdigit() and part not in ("model", "layers"))
        kinds.setdefault((kind, tuple(parameters)), []).append([parameter.shape for parameter in parameters.values()])
    total, everything = (sum(p.numel() for p in some) for some in (trainable(model).values(), model.parameters()))
    shapes = ["  ".join(f"{name} {_shape_range(shapes)}" for name, shapes in zip(names, zip(*layers)))
              for (_, names), layers in kinds.items()]
    width = max([37] + [len(text) + 2 for text in shapes])
    lines = [f"{'module':<26}{'trains':<{width}}{'layers':>7}{'parameters':>14}"]
    for ((kind, _), layers), text in zip(kinds.items(), shapes):
        lines.append(f"{kind:<26}{text:<{width}}{len(layers):>7}{sum(map(math.prod, sum(layers, []))):>14,}")
    lines.append(f"{'all':<{width + 33}}{total:>14,}  ({100 * total / everything:.2f} % of {everything:,})")
    frozen = sum(tensor.numel() for tensor in adapter_tensors(model).values()) - total
    if frozen:
        lines.append(f"{'frozen, added and saved beside them':<{width + 33}}{frozen:>14,}")
    return lines


def _shape_range(shapes):
    """[[2, 64], [9, 64]] -> [2-9, 64]."""
    ends = [(min(sizes), max(sizes)) for sizes in zip(*shapes)]
    return "[" + ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ends) + "]"


@torch.no_grad()
def relative_change(model):
    """|dW|_F / |W|_F over all adapted matrices together; None where no layer has a dW of its own."""
    layers = [layer for _, layer in adapted_layers(model) if not layer.unmergeable]
    squares = []
    for layer in layers:
        down, up = layer.lora_factors()
        change = up @ down  # (out, in)
        original = layer.weight.float() + layer.delta() - change
        squares.append(torch.stack((change.square().sum(), original.square().sum())))
    if not squares:
        return None
    change, original = torch.stack(squares).sum(0)
    return (change / original).sqrt().item()


# ---- merging --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def merge(model):
    """Turn every adapted layer into a plain `nn.Linear` with weight + delta(), summed in fp32 and rounded once.

    One way: the base cannot be had back by subtracting. Raises ValueError, before anything has changed, for a layer
    that no single matrix equals.
    """
    for name, layer in adapted_layers(model):
        if layer.unmergeable:
            raise ValueError(f"{name} cannot be merged: {layer.unmergeable}")
    for name, layer in adapted_layers(model):
        with full_precision(layer.weight.device.type):
            merged = (layer.weight.float() + layer.delta().float()).to(layer.weight.dtype)  # (out, in)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(merged, requires_grad=False), layer.bias
        replace(model, name, linear)
    for name in [name for name, child in model.named_children() if isinstance(child, Shared)]:
        delattr(model, name)
    for note in ("adapter_config", "base_keys"):
        if hasattr(model, note):
            delattr(model, note)


# ---- files ----------------------------------------------------------------------------------------------------------

def adapter_tensors(model):
    """{name: tensor}: what attach added to the model, and what trains; with the base, all that is needed to rebuild."""
    added = {name: tensor for name, tensor in model.state_dict().items() if name not in model.base_keys}
    return {**added, **{name: parameter.detach() for name, parameter in trainable(model).items()}}


def save(model, path, base_name="", base_sha256=""):
    """Write the attached adapter as safetensors, with method, hyper-parameters and the base's identity inside."""
    if not hasattr(model, "adapter_config"):
        raise ValueError("nothing is attached to this model: there is no adapter to save (or it has been merged)")
    metadata = {"adapter": json.dumps(model.adapter_config), "base_name": base_name, "base_sha256": base_sha256}
    write_safetensors(path, adapter_tensors(model), metadata)


def read_config(path):
    """(tensors, config, base_name, base_sha256) of an adapter file; ValueError if it is not one."""
    tensors, metadata = read_safetensors(path)
    return tensors, checked_config(path, metadata), metadata.get("base_name", ""), metadata.get("base_sha256", "")


def checked_config(path, metadata):
    """The method and its settings in the metadata of the file `path`; ValueError if they are none."""
    if "adapter" not in metadata:
        raise ValueError(f"{path}: not an adapter file: its metadata has no 'adapter' entry")
    config = json_object(metadata["adapter"], path, "the 'adapter' metadata is ")
    if config.get("method") not in tuple(METHODS):
        raise fault(path, f"unknown method {config.get('method')!r}", f"known: {', '.join(METHODS)}")
    known = inspect.signature(method_function(config["method"], "attach")).parameters
    known = {key: known[key] for key in SETTINGS if key in known}
    for key, value in config.items():
        if key == "method":
            continue
        if key not in known:
            raise fault(path, f"{config['method']} has no setting {key}", "was it written by another version?")
        kind, is_kind = SETTINGS[key]
        if not is_kind(value) and not (value is None and known[key].default is None):
            raise fault(path, f"the setting {key} is {value!r}, expected {kind}")
    return config


def is_number(value):
    """Whether a JSON value is a number that fp32 can hold."""
    return type(value) in (int, float) and -1e30 < value < 1e30


WHOLE = "a whole number", lambda value: type(value) is int and -1 << 63 <= value < 1 << 63
NUMBER, FLAG = ("a number", is_number), ("true or false", lambda value: isinstance(value, bool))
TEXT, TEXTS = ("a text", lambda value: isinstance(value, str)), (
    "a list of texts", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value))
NUMBERS = "a map of numbers", lambda value: isinstance(value, dict) and all(map(is_number, value.values()))
# Of which kind each setting must be that an adapter file may hold.
SETTINGS = {"rank": WHOLE, "seed": WHOLE, "sets": WHOLE, "router_rank": WHOLE, "alpha": NUMBER, "threshold": NUMBER,
            "svd": TEXT, "basis": TEXT, "a_init": TEXT, "group_by": TEXT, "init": TEXT, "v_mode": TEXT,
            "core_only": FLAG, "targets": TEXTS, "extra": TEXTS, "ks": NUMBERS, "norms": NUMBERS}


def load(model, path, base_sha256="", force=False):
    """Attach the method named in the file to a fresh base `model` and fill in its tensors. Returns the config.

    Raises ValueError if the file is no adapter, if it belongs to another base (both checksums known and different;
    `force` takes it all the same), or if its tensors are not exactly those that the method has on this model.
    """
    tensors, config, name, sha256 = read_config(path)
    if sha256 and base_sha256 and sha256 != base_sha256 and not force:
        raise fault(path, f"this adapter was trained on another base model ({name}, sha256 {sha256[:12]}...; the one "
                          f"given has {base_sha256[:12]}...)", "load that base, or force it on this one (--force)")
    attach_saved(model, path, tensors, config, force)
    return config


@torch.no_grad()
def attach_saved(model, path, tensors, config, force=False):
    """Attach the method of `config` to a fresh base `model` and fill in `tensors`, both read from the file `path`.

    Raises ValueError if the tensors are not exactly those that the method has on this model.
    """
    checks = ("method", "norms") if force else ("method",)  # by its norms SARA knows its base
    try:
        settings = {key: value for key, value in config.items() if key not in checks}
        method_function(config["method"], "attach")(model, saved=tensors, **settings)
    except ValueError as error:
        raise fault(path, str(error), "load it on the base it was made for") from None
    targets = adapter_tensors(model)
    wrong = [f"missing {key}" for key in targets if key not in tensors]
    wrong += [f"unexpected {key}" for key in tensors if key not in targets]
    wrong += [f"{key} has dtype {tensor.dtype}" for key, tensor in tensors.items() if not tensor.is_floating_point()]
    wrong += [f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(target.shape)}"
              for key, target in targets.items() if key in tensors and tensors[key].shape != target.shape]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise fault(path, f"does not fit this model: {'; '.join(wrong[:4])}{more}", "load it on its own base")
    for key, target in targets.items():
        target.copy_(tensors[key])


# ---- a look at a method ---------------------------------------------------------------------------------------------

def demonstrate(attach, **options):
    """What `python METHOD.py` shows: the method's parts on one small linear, and that it starts and merges exactly."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 24)), torch.randn(5, 40)
    before = model(x)
    attach(model, targets=["0"], **options)
    print(f"{model.adapter_config['method']} on a linear (out 24, in 40): {tuple(x.shape)} -> {tuple(before.shape)}")
    for name, tensor in model.state_dict().items():
        print(f"  {name:<14}{str(tuple(tensor.shape)):<10}{'trains' if name in trainable(model) else 'frozen'}")
    print(f"trainable parameters      {sum(p.numel() for p in trainable(model).values())} of {before.shape[1] * 41}")
    print(f"|output - base| at step 0 {(model(x) - before).abs().max():.1e}")
    for parameter in trainable(model).values():  # as if it had been trained
        parameter.data += 0.1 * torch.randn_like(parameter)
    after = model(x)
    print(f"|output - base| trained   {(after - before).abs().max():.1e}")
    if model[0].unmergeable:
        print(f"does not merge            {model[0].unmergeable}\n")
        return
    merge(model)
    print(f"|merged - trained|        {(model(x) - after).abs().max():.1e}\n")
