"""Full fine-tuning: the baseline that every method here tries to come close to with far fewer parameters.

    W <- W + dW         no module is replaced and there is no delta(): the change is W_t - W_0

What trains: every parameter of the model (a tied embedding once), or with `targets` only those matrices.
Cost: gradient and AdamW state take 12 more bytes per parameter, 134,515,008 of them in the default model, and the
adapter file is the whole model. Precision: fp32 weights; small steps would vanish in bf16.
"""
import adapter


def attach(model, targets: list | None = None):
    """Make all of `model` train, or only the matrices named by `targets`. Nothing is replaced.

    Raises ValueError on an unknown target or a second attach.
    """
    adapter.refuse_a_second(model)
    trained = model.parameters()
    if targets is not None:
        trained = [linear.weight for _, linear in adapter.find_linears(model, targets)]
    adapter.freeze(model)
    for parameter in trained:
        parameter.requires_grad_(True)
    adapter.record(model, "full", targets=None if targets is None else list(targets))


METHODS = {"full": adapter.Method(attach, learning_rate=1e-4)}
