"""A calibrated file as the beginning of a distillation (`--calibration`): its selection, and the priors behind it."""

from __future__ import annotations

from dataclasses import replace

from caprese_kernels.adapters import Adapters
from caprese_kernels.config import AdapterConfig, BaseModelInfo, Method, method_of, resolve_layers
from caprese_kernels.errors import CapreseError

from .config import DistillConfig
from .options import flag


def read_calibration(config: DistillConfig) -> tuple[DistillConfig, Adapters | None]:
    """The settings with the selection of the file that they name, and that file's contents; None without a file.

    CapreseError for a file without priors, and for an option that is given and differs from the file.
    """
    if config.calibration is None:
        return config, None
    found = Adapters.load(config.calibration)
    where = f"calibration {config.calibration}"
    if not found.prior:
        raise CapreseError(
            where,
            expected="a file with priors",
            found="none",
            fix="make one with `caprese calibrate`, or leave out --calibration",
        )
    chosen = {
        "method": found.config.method,
        "density": found.config.density,
        "layers": sorted(found.config.layers),
        "score": found.config.score,
        "prior": found.config.prior,
        "core": found.config.core,
    }
    for name, value in chosen.items():
        given = getattr(config, name)
        if name == "layers" and given is not None:
            given = list(resolve_layers(given, found.config.base_model.num_hidden_layers))
        if name in config.model_fields_set and given not in (None, value):
            raise CapreseError(
                flag(name),
                expected=f"{value}, as {config.calibration} has it",
                found=str(given),
                fix=f"leave out {flag(name)} or --calibration",
            )
    return config.model_copy(update=chosen), found


def calibrated_densities(method: Method, calibrated: AdapterConfig) -> Method:
    """`method`, whose layers and density are the file's, with the file's density for each layer where it has them."""
    return replace(method, densities=method_of(calibrated).restricted(method.layers).densities)


def check_calibration(config: DistillConfig, calibrated: AdapterConfig, model: BaseModelInfo) -> None:
    """CapreseError for a file that was made for a model of other dimensions."""
    calibrated.base_model.check_serves(model, f"calibration {config.calibration}")
