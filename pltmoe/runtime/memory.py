"""How many bytes the tensors of this process take, now."""

import gc

import torch


def tensor_bytes() -> int:
    """Return what is allocated on the GPU; without one, the storages of all tensors in Python.

    Those count once however many tensors share them, and gradients count though Python may not
    have seen them. What only autograd or a C++ library holds is not seen.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
