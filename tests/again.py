"""What stands in for CUDA graphs where there is no GPU."""
import torch


class Again:
    """graphs.Side without a GPU: it counts what is recorded, and does it again."""
    recorded = 0

    def __init__(self, device):
        assert device.index is not None or device.type == "cpu"  # "cuda" alone would be whichever is current

    def run(self, *passes):
        for one in passes:
            one()

    def join(self):
        pass

    def record(self, work):
        Again.recorded += 1
        with_gradients = torch.is_grad_enabled()

        def again():
            with torch.set_grad_enabled(with_gradients):
                work()
        return again
