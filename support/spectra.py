"""How far training has moved a weight matrix, seen in its SVD: the analysis of SORSA's paper (arXiv 2409.00055).

    W_0 = U_0 diag(s_0) V_0^T     the original matrix (out, in): k = min(out, in) triplets, s descending
    W_t = U_t diag(s_t) V_t^T     the same matrix now; its triplet j is compared with triplet j of W_0

    Delta Sigma = (1/k) sum_j |s_t^j - s_0^j|                                    how far the lengths have moved
    Delta D     = 1 - (1/2k) sum_j (|<u_t^j, u_0^j>| + |<v_t^j, v_0^j>|)         and the directions: 0 .. 1
    |dW|/|W|    = ||W_t - W_0||_F / ||W_0||_F

The signs that an SVD leaves free do not count. Where singular values lie close together, as in the tail, a small change
turns their vectors into each other: index j then compares strangers, and Delta D counts that too.

Where a principal part W_p of rank r trains (SORSA's U diag(S) V^T, PiSSA's B A), at the start and now

    kappa(W_p)  = sigma_1 / sigma_r
    ||U^T U - I||_F and ||V^T V - I||_F     of SORSA alone: PiSSA's B and A each carry sqrt(S), and are not meant to be
                                            orthonormal

One matrix is looked at after the other, in fp64, so that W_0 and W_t are never there of more than one. The triplets of
W_0 are found again each time: to keep them would take three times the memory of the matrices (1.3 GB for the default
model), and save half of the time (of about 20 seconds of one core for its 210 matrices).
"""
import torch

import adapter
from pissa import PiSSALinear
from sorsa import SORSALinear


# ---- one matrix -----------------------------------------------------------------------------------------------------

def variation(W_0, W_t):
    """Delta Sigma, Delta D and |dW|/|W| between two matrices (out, in) in fp64."""
    (U_0, s_0, Vt_0), (U_t, s_t, Vt_t) = triplets(W_0), triplets(W_t)
    cosines = (U_t * U_0).sum(dim=0).abs() + (Vt_t * Vt_0).sum(dim=1).abs()  # (k,), of u and of v: 2 where none turned
    return {"delta_sigma": (s_t - s_0).abs().mean().item(), "delta_d": 1 - cosines.mean().item() / 2,
            "change": (torch.linalg.matrix_norm(W_t - W_0) / torch.linalg.matrix_norm(W_0)).item()}


def triplets(W):
    """The economy SVD of W (out, in) in fp64: U (out, k), s (k,) descending, Vt (k, in).

    By eigenvectors of the smaller of W W^T and W^T W, in two thirds of an SVD's time; on matrices of the default model
    `variation` says the same to 1e-11. An SVD in fp32 is no faster, and up to 7e-6 off in Delta D: too much, where
    training moves it by 5e-5. W W^T squares the condition of W: where that is above 1e4, it is the SVD that is taken.
    """
    if W.shape[0] > W.shape[1]:
        V, s, Ut = triplets(W.T)
        return Ut.T, s, V.T
    eigenvalues, U = torch.linalg.eigh(W @ W.T)  # ascending: (k,), (k, k)
    s, U = eigenvalues.clamp(min=0).sqrt().flip(0), U.flip(1)
    if not s[-1] > 1e-4 * s[0]:
        return torch.linalg.svd(W, full_matrices=False)
    return U, s, U.T @ W / s[:, None]


def kappa(left, right):
    """sigma_1 / sigma_r of left @ right, (out, r) and (r, in), which is not built: with left = Q_1 R_1 and right^T =
    Q_2 R_2 it has the singular values of R_1 R_2^T (r, r)."""
    R_1, R_2 = torch.linalg.qr(left).R, torch.linalg.qr(right.T).R
    s = torch.linalg.svdvals(R_1 @ R_2.T)  # (r,) descending
    return (s[0] / s[-1]).item()


def orthonormality(M):
    """||M^T M - I||_F of M (d, r)."""
    return torch.linalg.matrix_norm(M.T @ M - torch.eye(M.shape[1]).to(M)).item()


# ---- one layer ------------------------------------------------------------------------------------------------------

def double(tensor):
    """In fp64, where there is such a thing."""
    return adapter.with_fp64(tensor.detach()).double()


def before_and_now(layer, original=None):
    """W_0 and W_t (out, in) of a layer, in fp64; `original` is the W_0 of one that trains its weight itself.

    The change is a product in fp64, so that at step 0 it is nothing. What was rounded in `weight` is in both: of a run
    in bf16 train.py compares the rounded matrix, and a run loaded again, in fp32, the matrix itself.
    """
    weight = double(layer.weight)
    if original is not None:
        return double(original).to(weight.device), weight
    down, up = map(double, layer.lora_factors())  # (k, in), (out, k)
    change = up @ down
    W_0 = weight + double(layer.delta()) - change  # for SORSA: W_r + W_p - (W_p - its start)
    return W_0, W_0 + change


def principal_factors(layer):
    """[(left (out, r), right (r, in))] with W_p = left @ right, at the start and now; [] where no W_p trains."""
    if isinstance(layer, SORSALinear):
        return [(double(U) * double(S), double(Vt))
                for U, S, Vt in ((layer.U0, layer.S0, layer.Vt0), (layer.U, layer.S, layer.Vt))]
    if isinstance(layer, PiSSALinear):
        return [(double(layer.B0), double(layer.A0)), (double(layer.B), double(layer.A))]
    return []


def measure_layer(name, layer, original=None):
    """{name: number} of all that is said of one layer; None where W_0 is zero, which has no directions.
    FloatingPointError where there is no SVD."""
    with adapter.full_precision(layer.weight.device.type):
        W_0, W_t = before_and_now(layer, original)
        if not W_t.isfinite().all():
            raise FloatingPointError(f"{name} is not finite any more, so it has no SVD: train with a lower --lr")
        if not torch.linalg.matrix_norm(W_0) > 1e-6 * torch.linalg.matrix_norm(W_t):  # of zeros rounding is left
            return None
        numbers = variation(W_0, W_t)
        for when, (left, right) in zip(("_start", ""), principal_factors(layer)):
            numbers[f"kappa{when}"] = kappa(left, right)
        if isinstance(layer, SORSALinear):
            for when, U, Vt in (("_start", layer.U0, layer.Vt0), ("", layer.U, layer.Vt)):
                numbers[f"u_error{when}"] = orthonormality(double(U))
                numbers[f"v_error{when}"] = orthonormality(double(Vt).T)
    return numbers


# ---- all layers of a model ------------------------------------------------------------------------------------------

def original_matrices(model, targets=None):
    """{name: W_0 (out, in)} of a base without a method, for full fine-tuning: those of the model, to be copied if it
    trains. `targets` as its attach takes them; for None the seven projections count, not the embedding."""
    linears = adapter.find_linears(model, targets or adapter.TARGETS)
    return {name: linear.weight.detach() for name, linear in linears}


def unmeasurable(model, originals=None):
    """None, or why a method's change cannot be measured. `originals`: see `measure`."""
    method, layers = model.adapter_config["method"], adapter.adapted_layers(model)
    if not layers and not originals:
        return f"{method} replaces no linear layer, so there is no W_0 to compare with"
    for name, layer in layers:
        if layer.unmergeable:
            return f"{method} has no W_t at {name}: {layer.unmergeable}"
        if not hasattr(layer, "lora_factors"):
            return f"{method} has no lora_factors() at {name}, from which W_0 would follow"


@torch.no_grad()
def measure(model, originals=None):
    """Yield (name, numbers) of every adapted matrix that was not zero, one at a time; of full fine-tuning, those with
    an original W_0 in `originals`, {name: (out, in)} on any device."""
    layers = [(name, model.get_submodule(name)) for name in originals] if originals else adapter.adapted_layers(model)
    for name, layer in layers:
        numbers = measure_layer(name, layer, (originals or {}).get(name))
        if numbers is not None:
            yield name, numbers


def means(rows):
    """The mean of each number over layers, [numbers]; of the orthonormality errors the largest too. ValueError for no
    layers: every matrix was zero."""
    if not rows:
        raise ValueError("all adapted matrices of the base are zero: there are no singular vectors to compare")
    found = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    return found | {f"{key}_max": max(row[key] for row in rows) for key in ("u_error", "v_error") if key in found}


def text(numbers):
    """The means on one line."""
    said = f"dSigma {numbers['delta_sigma']:.2e}  dD {numbers['delta_d']:.2e}  |dW|/|W| {numbers['change']:.1e}"
    if "kappa" in numbers:
        said += f"  kappa {numbers['kappa_start']:.6g} -> {numbers['kappa']:.6g}"
    for key, name in (("u_error", "|UtU-I|"), ("v_error", "|VtV-I|")):
        if key in numbers:
            said += f"  {name} {numbers[key]:.1e} (most {numbers[f'{key}_max']:.1e})"
    return said
