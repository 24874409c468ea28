"""Models of Transformer Engine's modules in float32, on the virtual GPU (tests/virtual_te.py).

    TRITON_INTERPRET=1 python -m tests.unit.virtual_te_cases row5_plt2 shared_routing_plt3

compares them with the float64 reference: logits, loss and every gradient. A GPU could not do that,
it would multiply in TF32. Attention is Transformer Engine's unfused one, and its Triton kernels,
which permute tokens, run as they are.
"""

import sys
import tempfile
from pathlib import Path

from tests import virtual_te

virtual_te.install()

import torch  # noqa: E402

from tests.single_process import build_model, create_single_process_groups  # noqa: E402
from tests.unit.model.cases import ALL, small_model  # noqa: E402
from tests.unit.model.parity import ROUNDED, assert_equals_reference  # noqa: E402
from tests.virtual_gpu import VirtualGPU  # noqa: E402

if __name__ == "__main__":
    with VirtualGPU(), tempfile.TemporaryDirectory() as folder:
        groups = create_single_process_groups(Path(folder))
        for name in sys.argv[1:]:
            model = small_model(**{**ALL[name], **ROUNDED})
            plt = build_model(model, groups, torch.float32, "transformer_engine")
            assert_equals_reference(plt, model, tolerance=2e-4, loss_tolerance=1e-4)
            print(name, "equals the reference", flush=True)
