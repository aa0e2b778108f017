"""The verbs that all methods share, and nothing of any method: find, freeze, replace, count, merge, state out and in.

A method is `attach(model, ...)`: it replaces `nn.Linear` layers of any torch model, in place, and leaves
`requires_grad` True exactly on what the method trains. The layers it puts in derive from `AdaptedLinear`. The frozen
`weight` and `bias` stay under their old names, so the base model's state dict keeps its keys (PiSSA and SORSA take a
part out of `weight`: at step 0 the original is weight + delta()), all on one device, and

    layer.forward(x)       the paper's equation, which never builds delta() while training
    layer.delta()          (out, in), what forward adds to `weight`
    layer.lora_factors()   (down (k, in), up (out, k)): up @ down is the change against the original weight
    layer.unmergeable      None, or why no matrix equals the change (Mo-SARA); delta() and lora_factors() then raise

A method whose change has no low rank leaves lora_factors out. To use a method elsewhere, copy its file and this one
(for PiSSA and CoRA lora.py too).
"""
import contextlib
import copy
from collections import Counter
from fnmatch import fnmatchcase
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdaptedLinear(nn.Module):
    """The `nn.Linear` it replaces, frozen: the same `weight` (out, in) and `bias` (out,) tensors, no copy made.

    Methods keep their factors in fp32 on the weight's device and cast them to the dtype of x where they meet it. They
    add to the base's output in place, which saves a tensor of its size.
    """

    unmergeable = None

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)

    def base(self, x):
        """W x + b: (..., out) for x (..., in)."""
        return F.linear(x, self.weight, self.bias)

    def factor(self, tensor):
        """A trained factor that starts as `tensor`: fp32, on the weight's device."""
        return nn.Parameter(tensor.detach().to(self.weight.device, torch.float32, copy=True))

    def extra_repr(self):
        own = ", ".join(f"{name} {tuple(p.shape)}" for name, p in self.named_parameters() if p.requires_grad)
        return f"in_features={self.in_features}, out_features={self.out_features}, trains of its own: {own}"


class Shared(nn.Module):
    """Modules that own what groups of layers share, {key of the group (no dots): module}.

    It is registered once, on the model. A layer refers to its group's module from inside a tuple, where PyTorch does
    not register it again: the state dict, the optimizer and a parameter count see each tensor once. The layer still
    finds it after the model has been moved or cast, which replaces tensors and not modules, or deep-copied, which takes
    both along.
    """

    def __init__(self, groups):
        super().__init__()
        for key, group in groups.items():
            self.add_module(key, group)

    def forward(self, x):
        """x: of a model that is an nn.Sequential this module has become the last step."""
        return x


class Method(NamedTuple):
    """What a script reads of a method. Each method file ends with its own: METHODS = {name: Method(...)}.

    attach         its signature says which flags there are: their kinds (annotations), choices (Literal) and defaults;
                   whole numbers from 1, others from 0, a bool starts False; a name that another method has is its kind
    learning_rate  the peak rate to start from
    help           {argument: what its flag says}, for the arguments that support/flags.py does not know
    fit            fit(model, params, ...) -> {argument: value}: the size that comes nearest to a budget of parameters
    regularize     regularize(model, peak_lr, ...) adds to the gradients once per step, after clipping, and returns the
                   penalty R; the arguments behind the first two are flags too
    watch          watch(model, tokens) -> {name: float}, logged with each held-out loss
    table          table(model) -> lines of text, printed before training
    """
    attach: Callable
    learning_rate: float
    help: dict = {}
    fit: Callable | None = None
    regularize: Callable | None = None
    watch: Callable | None = None
    table: Callable | None = None


# ---- attaching ------------------------------------------------------------------------------------------------------

def refuse_a_second(model):
    """ValueError if a method is already attached, or the model is torch.compile's wrapper of another."""
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled already: attach first, then torch.compile it")
    if hasattr(model, "adapter_config") or adapted_layers(model):
        method = getattr(model, "adapter_config", {}).get("method", "a method")
        raise ValueError(f"{method} is already attached to this model: "
                         "merge it with adapter.merge(model), or start from a fresh base")


def find_linears(model, targets, rank=1):
    """[(name, nn.Linear)] in module order: those whose name, or the end of it behind one of its dots, is one of
    `targets`, where * and [0-9] stand for what they do in file names: q_proj, layers.2[0-9].mlp.*

    The default TARGETS stand for those of the seven that the model has (GPT-2 has no gate_proj). The out_proj of an
    nn.MultiheadAttention, which reads its weight past its forward, is left out.

    Raises ValueError, before anything has changed, if a method is already attached, if there is no target, if one
    matches nothing or what `check_replaceable` refuses, or if `rank` is no int in 1 .. min(out, in) of every match.
    """
    refuse_a_second(model)
    if type(model) is nn.Linear:
        raise ValueError("the model is itself a linear, in whose place nothing can be put: give nn.Sequential(model)")
    if not isinstance(targets, (list, tuple)):
        raise ValueError(f"targets is {targets!r}: give a list of names, as in ['q_proj', 'v_proj']")

    def matches(name, target):
        return fnmatchcase(f".{name}", f"*.{target}")

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)
               and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)]
    names = [name.rpartition(".")[2] for name, _ in linears]
    if tuple(targets) == TARGETS and set(TARGETS) & set(names):
        targets = [target for target in TARGETS if target in names]
    for target in targets:
        if not any(matches(name, target) for name, _ in linears):
            raise ValueError(f"target {target!r} matches no linear layer: this model has "
                             f"{', '.join(dict.fromkeys(names)) or 'none'}")
    found = [(name, linear) for name, linear in linears if any(matches(name, target) for target in targets)]
    users = Counter(place(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, linear in found:
        check_replaceable(name, linear, model.get_submodule(name.rpartition(".")[0]), users[place(linear.weight)])
    if not found:
        raise ValueError("no targets given: name the linear layers to adapt, as in targets=['q_proj', 'v_proj']")
    name, smallest = min(((n, min(m.weight.shape)) for n, m in found), key=lambda pair: pair[1])
    if type(rank) is not int or not 1 <= rank <= smallest:
        raise ValueError(f"rank {rank!r} is out of range: it must be 1 .. {smallest}, the smaller side of {name}, "
                         "as an int")
    return found


def check_replaceable(name, linear, parent, users):
    """ValueError where a layer of a method could not stand in for `linear`: where it is more than an nn.Linear
    (quantised, parametrized, with hooks or a forward of its own, which would be lost), or has a weight that is used
    elsewhere too (a head tied to the embedding, one linear at two places: `users` counts them), that is computed, that
    `parent` reads past the forward, or that is no matrix of usable numbers."""
    if users > 1:
        raise ValueError(f"{name} shares its weight with another module: adapting the one would change the other")
    if type(linear) is not nn.Linear:
        raise ValueError(f"{name} is a {type(linear).__name__}, which is more than the nn.Linear it derives from: make "
                         "it a plain one, or name targets without it")
    if "weight" not in dict(linear.named_parameters()):
        raise ValueError(f"{name}'s weight is computed from other tensors, by pruning or weight norm: make it plain "
                         "first, as with torch.nn.utils.prune.remove or remove_weight_norm")
    if "forward" in vars(linear) or any(hooks for key, hooks in vars(linear).items() if key.endswith("_hooks")):
        raise ValueError(f"{name} has hooks, or a forward of its own, which its replacement would not have: remove "
                         "them, attach, and put them on again")
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(f"{name} lies in an nn.TransformerEncoderLayer, which in eval mode reads its weight and "
                         "leaves the adapter out: call torch.backends.mha.set_fastpath_enabled(False) first")
    check_numbers(name, linear.weight)


def place(parameter):
    """Where a parameter's numbers lie, by which two that share them are known; on the meta device its identity."""
    return parameter.data_ptr() or id(parameter)


def check_numbers(name, weight):
    """ValueError where a weight (out, in) of a base holds NaN, infinity, or numbers whose squares fp32 cannot sum: no
    product with it is finite, and W W^T, with which every decomposition begins, is not either."""
    norm = torch.linalg.vector_norm(weight.detach().float())
    if not weight.is_meta and not norm.isfinite():
        raise ValueError(f"{name} has weights that are not finite, or too large to compute with: the base model holds "
                         f"NaN, infinity or huge numbers there (norm {norm.item():g}); load another, or its file again")


def freeze(model):
    """Nothing of the base trains: frozen before the forward pass, a linear neither saves its input nor computes dW.
    The base's keys are noted, so that `state` can tell what attach has added."""
    model.requires_grad_(False)
    model.base_keys = frozenset(model.state_dict())


@torch.no_grad()
def cast_frozen(model, dtype):
    """Round what does not train to `dtype`, in place, one parameter at a time. It comes after attach, which takes W
    apart in the precision that it was loaded in. Factors stay fp32, and so do the buffers that methods keep of them."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def replace(model, name, layer):
    """Put `layer` in the place of the module called `name`, in its mode, train or eval."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer.train(model.get_submodule(name).training))


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


def scaling(alpha, rank):
    """alpha / r, by which a change is scaled, or 1 for alpha=None. ValueError for an alpha that is not above 0, or that
    fp32 could not compute with."""
    if alpha is not None and not 1e-6 <= alpha <= 1e6:
        raise ValueError(f"alpha {alpha:g} is out of range: it must be above 0, from 1e-6 to 1e6")
    return 1.0 if alpha is None else alpha / rank


def check_choice(what, value, choices):
    """ValueError unless `value`, the argument called `what`, is one of `choices`."""
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")


def uniform_factor(rank, inner, generator):
    """LoRA's A (rank, in) at the start: uniform in +-1/sqrt(in), drawn as `gaussian` draws."""
    drawn = torch.rand(rank, inner, generator=generator, device="cpu", dtype=torch.float32)
    return (2 * drawn - 1) * inner ** -0.5


def gaussian(*shape, generator):
    """N(0, 1) in fp32, drawn on the CPU whatever torch's defaults are: a seed gives every device the same."""
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)


def nearest_rank(linears, params, count):
    """{"rank": r} for the r that all `linears` allow and whose count(r) comes nearest to `params`."""
    limit = min(min(linear.weight.shape) for _, linear in linears)
    return {"rank": min(range(1, limit + 1), key=lambda rank: abs(count(rank) - params))}


# ---- singular vectors -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def full_precision(device_type):
    """No autocast and no TF32 inside: both would lift rounding from 1e-7 to 1e-3. What was set is set again after."""
    settings = [(torch.backends.cuda.matmul, "allow_tf32", False)]
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later, where the two APIs do not mix
        backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        settings = [(backend, "fp32_precision", "ieee") for backend in backends]
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for (owner, name, _), value in zip(settings, before):
            setattr(owner, name, value)


def with_fp64(weight):
    """The weight where fp64 is computed: on its device, or for a Mac's GPU, which has none, on the CPU. ValueError for
    one on the meta device."""
    if weight.device.type == "meta":
        raise ValueError("a weight on the meta device has no numbers to start from: load the weights first")
    return weight.cpu() if weight.device.type == "mps" else weight


@torch.no_grad()
def principal_triplets(weight, rank, svd="gram"):
    """The `rank` leading singular triplets of weight (out, in): U (out, r), S (r,) descending, Vt (r, in), all fp32.

    svd="exact"  economy SVD in fp32.
    svd="gram"   the same to fp32's accuracy, several times faster, by eigenvectors of the smaller of W W^T and W^T W;
                 single vectors less exactly where one singular value dwarfs a flat rest.
    The sign that an SVD leaves free is fixed: the entry of largest magnitude in each row of Vt is positive.
    """
    check_choice("svd", svd, ("exact", "gram"))
    device, weight = weight.device, with_fp64(weight)
    with full_precision(weight.device.type):
        if svd == "exact":
            U, S, Vt = torch.linalg.svd(weight.float(), full_matrices=False)
            U, S, Vt = U[:, :rank], S[:rank], Vt[:rank]
        else:
            U, S, Vt = triplets_from_gram(weight, rank, torch.float32)
            if S[-1] < 0.03 * S[0]:  # in W W^T a thousandth: what is smaller drowns in its fp32 rounding
                U, S, Vt = triplets_from_gram(weight, rank, torch.float64)
    Vt, sign = fix_signs(Vt)
    return tuple(factor.float().contiguous().to(device) for factor in (U * sign.T, S, Vt))


def triplets_from_gram(W, rank, dtype):
    """U, S, Vt in fp64 of W (out, in), from W W^T = U S^2 U^T, or where W is tall, from W^T W.

    The eigenvectors are found in `dtype`, 8 more than asked for, so that the wanted ones lie in the space that they
    span. In it the SVD of W is a small one, done in fp64: the singular values are then right to the square of the
    space's error (Rayleigh-Ritz).
    """
    if W.shape[0] > W.shape[1]:
        U, S, Vt = triplets_from_gram(W.T, rank, dtype)
        return Vt.T, S, U.T
    _, vectors = torch.linalg.eigh(W.to(dtype) @ W.to(dtype).T)  # ascending
    Q = torch.linalg.qr(vectors[:, -(rank + 8):].double()).Q  # (out, r + 8), or all out
    U, S, Vt = torch.linalg.svd(Q.T @ W.double(), full_matrices=False)  # (r + 8, r + 8), (r + 8,), (r + 8, in)
    return Q @ U[:, :rank], S[:rank], Vt[:rank]


def fix_signs(Vt):
    """(rows of Vt turned so that the entry of largest magnitude in each is positive, the signs (r, 1) that do it)."""
    largest = Vt.gather(1, Vt.abs().argmax(dim=1, keepdim=True))  # (r, 1)
    sign = torch.where(largest < 0, -1.0, 1.0).to(Vt)
    return Vt * sign, sign


@torch.no_grad()
def subtract(weight, up, down):
    """weight <- weight - up @ down: computed in fp32, rounded once to the weight's dtype. The parameter stays, with
    new numbers: a state dict of the base that was taken before keeps the old ones."""
    with full_precision(weight.device.type):
        weight.data = (weight.float() - up @ down).to(weight.dtype)


# ---- counting and merging -------------------------------------------------------------------------------------------

def trainable(model):
    """{name: Parameter} of what trains, each tensor once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def relative_change(model):
    """|dW|_F / |W|_F over all adapted matrices together; None where no layer gives lora_factors()."""
    squares = []
    for _, layer in adapted_layers(model):
        if not layer.unmergeable and hasattr(layer, "lora_factors"):
            down, up = layer.lora_factors()
            change = up @ down  # (out, in)
            original = layer.weight.float() + layer.delta() - change  # for SORSA: W_r + W_p - (W_p - its start)
            squares.append(torch.stack((change.square().sum(), original.square().sum())))
    if not squares:
        return None
    change, original = torch.stack(squares).sum(0)
    return (change / original).sqrt().item()


@torch.no_grad()
def merge(model):
    """Turn every adapted layer into a plain `nn.Linear` with weight + delta(), summed in fp32 and rounded once.

    One way: subtracting again would not give the base back exactly. Raises ValueError, before anything has changed, for
    a layer that no single matrix equals.
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
    for module in list(model.modules()):  # the one that attach was given may lie inside
        shared = [name for name, child in module.named_children() if isinstance(child, Shared)]
        for name in [*shared, *({"adapter_config", "base_keys"} & vars(module).keys())]:
            delattr(module, name)


# ---- state out and in -----------------------------------------------------------------------------------------------

def state(model):
    """{name: tensor}: what attach added to the model, and what trains. With model.adapter_config and the base it is all
    that is needed to rebuild: attach with that config less "method", and saved=state, then `fill`. (Buffers of the base
    that a forward changes, as BatchNorm's, are not in it.) These are the model's own tensors, which go on training:
    clone what is to be kept. ValueError unless it is the model that attach was given."""
    if "base_keys" not in vars(model):
        raise ValueError("no method is attached to this model itself: give the one that attach was given, and no "
                         "wrapper or part of it")
    added = {name: tensor for name, tensor in model.state_dict().items() if name not in model.base_keys}
    return {**added, **{name: parameter.detach() for name, parameter in trainable(model).items()}}


@torch.no_grad()
def fill(model, tensors):
    """Copy `tensors`, the `state` of another model, into a model with the same method attached. ValueError unless they
    are exactly those of its own state."""
    targets = state(model)
    wrong = [f"missing {key}" for key in targets if key not in tensors]
    wrong += [f"unexpected {key}" for key in tensors if key not in targets]
    wrong += [f"{key} has dtype {tensors[key].dtype}, expected {target.dtype}" for key, target in targets.items()
              if key in tensors and tensors[key].dtype != target.dtype
              and not (tensors[key].is_floating_point() and target.is_floating_point())]
    wrong += [f"{key} holds NaN or infinity" for key, tensor in tensors.items() if not is_finite(tensor)]
    wrong += [f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(target.shape)}"
              for key, target in targets.items() if key in tensors and tensors[key].shape != target.shape]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"does not fit this model: {'; '.join(wrong[:4])}{more}")
    for key, target in targets.items():
        target.copy_(tensors[key])


def is_finite(tensor):
    """Whether a tensor holds no NaN and no infinity; made without another of its size."""
    return tensor.is_meta or not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def saved_tensor(saved, name, shape):
    """The tensor called `name` of a saved state, which must have the given shape. ValueError where it is not there."""
    if name not in saved:
        raise ValueError(f"there is no tensor {name}: the saved state does not fit this model, or was cut off")
    if tuple(saved[name].shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(saved[name].shape)} in the saved state, expected {tuple(shape)}")
    return saved[name]


def check_saved(saved, shapes):
    """ValueError unless a saved state, where there is one, has tensors of the shapes {name: shape}: asked before memory
    is taken for what `fill` will replace."""
    for name, shape in shapes.items() if saved is not None else ():
        saved_tensor(saved, name, shape)


# ---- a method at work -----------------------------------------------------------------------------------------------

class Toy(nn.Module):
    """Two blocks with a query, a key and a value projection each: something to share within a block and across."""

    def __init__(self):
        super().__init__()
        widths = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(32, out, bias=False) for name, out in widths.items()}) for _ in range(2))

    def forward(self, x):
        for block in self.layers:
            x = x + torch.tanh(block.q_proj(x) + torch.cat((block.k_proj(x), block.v_proj(x)), dim=-1))
        return x


def demonstrate(attach, facts, learning_rate=1e-2, regularize=None, **options):
    """What `python METHOD.py` prints: the parts on a toy model, a regression that they fit, what moved, the merge.

    The regression's targets are the outputs of the same model with every weight changed by a matrix of rank 2.
    `facts(q, k, v, later_q)` returns lines about the trained layers of the first block and the second one's q_proj.
    """
    torch.manual_seed(0)
    model, x = Toy(), torch.randn(256, 32)
    teacher = copy.deepcopy(model).requires_grad_(False)
    for parameter in teacher.parameters():
        parameter += 0.1 * torch.randn(len(parameter), 2) @ torch.randn(2, parameter.shape[1])
    base, goal = model(x).detach(), teacher(x)
    attach(model, targets=["q_proj", "k_proj", "v_proj"], **options)
    trained, start = trainable(model), copy.deepcopy(model.state_dict())
    print(f"{model.adapter_config['method']} on 2 blocks of q_proj (32 -> 32), k_proj and v_proj (32 -> 16)")
    for name, tensor in start.items():
        if ".0.q_proj" in name or not name.startswith("layers"):
            print(f"  {name:<28}{str(tuple(tensor.shape)):<10}{'trains' if name in trained else 'frozen'}")
    print(f"  trainable parameters        {sum(p.numel() for p in trained.values()):,}, the base has "
          f"{sum(p.numel() for p in teacher.parameters()):,}")
    print(f"step 0       |output - base's| {(model(x) - base).abs().max():.1e}")
    optimizer, losses = torch.optim.Adam(trained.values(), lr=learning_rate), []
    for _ in range(200):
        loss = F.mse_loss(model(x), goal)
        optimizer.zero_grad()
        loss.backward()
        if regularize:
            regularize(model)
        optimizer.step()
        losses.append(loss.item())
    print(f"training     regression loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
    moved = {"trained": [], "frozen": []}
    for name, tensor in model.state_dict().items():
        moved["trained" if name in trained else "frozen"].append((tensor - start[name]).abs().max())
    print(f"moved        trained by up to {max(moved['trained']):.3f}, frozen by {max(moved['frozen']):.1e}")
    first, later = model.layers
    for line in facts(first.q_proj, first.k_proj, first.v_proj, later.q_proj):
        print(f"             {line}")
    if first.q_proj.unmergeable:
        print(f"no merge     {first.q_proj.unmergeable}\n")
        return
    after = model(x)
    merge(model)
    print(f"merge        |merged - trained| {(model(x) - after).abs().max():.1e}, plain nn.Linear again\n")
