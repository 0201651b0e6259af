"""Know the devices that a plan may be for: memory, rates and links, each with its source."""

import difflib
from dataclasses import dataclass

from fairseq_moe.errors import ConfigError

__all__ = ["DEVICES", "Device", "device_named"]

_GIB = 1 << 30
_TERA = 10**12
_GIGA = 10**9


@dataclass(frozen=True, kw_only=True)
class Device:
    """Describe one rank's device.

    Args:
        name: as ``--device`` takes it.
        memory_bytes: that a process can have.
        peak_flops: dense products in bfloat16 (on a CPU in float32), per second.
        memory_bytes_per_sec: read and written, of its own memory.
        node_bytes_per_sec: sent by a rank to others of its node, one way.
        network_bytes_per_sec: sent by a rank to other nodes, one way.
        ranks_per_node: devices that the first link joins.
        runs_kernels: whether Triton's kernels run there (``fused``): Adam then needs no float32 copy of gradients.
    """

    name: str
    memory_bytes: int
    peak_flops: int
    memory_bytes_per_sec: int
    node_bytes_per_sec: int
    network_bytes_per_sec: int
    ranks_per_node: int = 8
    runs_kernels: bool = True


def _gpu(name: str, *, gib: float, tflops: float, hbm_gb: int, link_gb: int, network_gb: int) -> Device:
    return Device(
        name=name,
        memory_bytes=int(gib * _GIB),
        peak_flops=int(tflops * _TERA),
        memory_bytes_per_sec=hbm_gb * _GIGA,
        node_bytes_per_sec=link_gb * _GIGA,
        network_bytes_per_sec=network_gb * _GIGA,
    )


# Peaks without sparsity and bandwidths: NVIDIA's data sheets (H100 SXM5 2023, H200 2024, A100 SXM4 2021, B200 of DGX
# B200 2024); NVLink one way is half of the sheets' figure. The network is the usual one of such nodes: one port of 400
# Gb/s per GPU (200 Gb/s with A100). Memory is what torch.cuda.get_device_properties reports, below the sheets' figure.
_ALL = (
    _gpu("h100", gib=79.1, tflops=989.4, hbm_gb=3_350, link_gb=450, network_gb=50),
    _gpu("h200", gib=139.8, tflops=989.4, hbm_gb=4_800, link_gb=450, network_gb=50),
    _gpu("a100-40", gib=39.4, tflops=312, hbm_gb=1_555, link_gb=300, network_gb=25),
    _gpu("a100-80", gib=79.2, tflops=312, hbm_gb=2_039, link_gb=300, network_gb=25),
    _gpu("b200", gib=178.4, tflops=2_250, hbm_gb=8_000, link_gb=900, network_gb=50),
    # One core of docs/benchmarks.md (Zen 5, float32): 2048 x 2 rows of D 512, F 2048, forward and backward, in 565 ms
    # are 91 GFLOP/s. The rest is of the order that virtual machines have: 8 GiB and gloo over loopback for each rank.
    Device(
        name="cpu",
        memory_bytes=8 * _GIB,
        peak_flops=100 * _GIGA,
        memory_bytes_per_sec=10 * _GIGA,
        node_bytes_per_sec=_GIGA,
        network_bytes_per_sec=_GIGA,
        runs_kernels=False,
    ),
)
DEVICES = {device.name: device for device in _ALL}


def device_named(name: str) -> Device:
    """Find a device by its name, in any case.

    Raises:
        ConfigError: there is none of that name.
    """
    found = DEVICES.get(name.lower())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.0)
    raise ConfigError(
        [
            f"--device is {name!r}, expected one of {', '.join(DEVICES)}; the nearest is {near[0] if near else 'h100'}."
        ]
    )
