"""The contract with diffusers that every scheduler keeps, and the round trips of those that can be undone.

A new scheduler is one line in `CASES`; what it promises beyond the least is said by the fields of [`Case`].
`ResShiftScheduler` has none: its models have no betas and start from a degraded picture, so that no stock scheduler or
pipeline is there to compare it with. What of this contract holds for it is in its own file.
"""

import ast
import inspect
import json
import math
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.schedulers.noise_schedule import split_prediction
from sfumato.schedulers.scheduling_bdia import BDIAScheduler
from sfumato.schedulers.scheduling_belm import BELMScheduler
from sfumato.schedulers.scheduling_ddcm import DDCMScheduler
from sfumato.schedulers.scheduling_edict import EDICTScheduler
from sfumato.schedulers.scheduling_edit_friendly_ddpm import EditFriendlyDDPMScheduler
from sfumato.schedulers.scheduling_fixed_point import FixedPointScheduler
from sfumato.schedulers.scheduling_minority_guidance import MinorityGuidanceScheduler
from sfumato.schedulers.scheduling_rddm import RDDMScheduler
from sfumato.schedulers.scheduling_time_shift import TimeShiftScheduler


@dataclass(frozen=True)
class Case:
    """A scheduler, and what it promises."""

    cls: type
    config: dict[str, Any] = field(default_factory=dict)
    processes: tuple[str, ...] = ("vp", "flow", "edm")
    undone: bool = True  # its steps can be undone: it refuses eta and latents changed between steps
    independent: bool = True  # samples of a batch do not see each other
    alone: bool = True  # it needs nothing but a sample; the steps of one that does have a test file of their own
    times_asked: bool = True  # `set_timesteps` without arguments is an error, not all times of the training
    ddim: dict[str, Any] | None = None  # the config that makes it DDIM where the noise does not depend on the state


# the settings with which RDDM, whose own models are no model of DDPM, takes a stock model over; see its own file, too
DDPM = {"alpha_schedule": None, "prediction_type": "epsilon", "timestep_spacing": "leading"}
CASES = {
    "BDIA": Case(BDIAScheduler, ddim={"gamma": 0.0}),
    "BDIA, exact": Case(BDIAScheduler, {"exact": True}),
    "BDIA, Heun": Case(BDIAScheduler, {"solver": "heun"}),
    "BELM": Case(BELMScheduler),
    "EDICT": Case(EDICTScheduler, ddim={}),
    "FixedPoint": Case(FixedPointScheduler, ddim={}),
    "EditFriendlyDDPM": Case(EditFriendlyDDPMScheduler, {"eta": 0.0}, ("vp",), False, ddim={}),
    "EditFriendlyDDPM, eta 1": Case(EditFriendlyDDPMScheduler, {"eta": 1.0}, ("vp",), False),
    "DDCM": Case(DDCMScheduler, {"original_inference_steps": None}, ("vp",), False, alone=False),
    "MinorityGuidance": Case(MinorityGuidanceScheduler, {"guidance_scale": 0.0}, ("vp",), False),
    "MinorityGuidance, DDIM": Case(
        MinorityGuidanceScheduler, {"guidance_scale": 0.0, "sampler": "ddim"}, ("vp",), False, ddim={}
    ),
    "RDDM": Case(RDDMScheduler, DDPM, ("vp",), False, times_asked=False, ddim={}),
    "TimeShift": Case(TimeShiftScheduler, {"window": 60}, ("vp",), False, False, ddim={"window": 0}),
    "TimeShift, pnm": Case(TimeShiftScheduler, {"mode": "pnm", "window": 60}, ("vp",), False, ddim={"window": 0}),
}
PROCESSES = [(name, process) for name, case in CASES.items() for process in case.processes]
ALONE = [name for name, case in CASES.items() if case.alone]
RUNS = [(name, process) for name, process in PROCESSES if name in ALONE]
UNDONE = [name for name, case in CASES.items() if case.undone]
DDIM = [name for name, case in CASES.items() if case.ddim is not None]

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SETTINGS = {"vp": SD, "flow": {"process": "flow", "shift": 3.0}, "edm": {"process": "edm"}}
SPACINGS = ["leading", "linspace", "trailing"]
ABSENT = ("LMSDiscreteScheduler", "DPMSolverSDEScheduler")  # they need scipy and torchsde
STOCK = [e.name for e in KarrasDiffusionSchedulers if e.name not in ABSENT and e.name != "EDMEulerScheduler"]


@pytest.fixture(autouse=True)
def same_noise(monkeypatch):
    """Where a step draws noise and is given no generator, every sample gets the same one, in each run."""

    def draw(shape, generator=None, device=None, dtype=None):
        if generator is not None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return noise(*shape[1:], seed=2, dtype=dtype).to(device).expand(shape)

    monkeypatch.setattr("sfumato.schedulers.scheduling_edit_friendly_ddpm.randn_tensor", draw)
    monkeypatch.setattr("sfumato.schedulers.carried_state.randn_tensor", draw)


def make(name, process="vp", **config):
    case = CASES[name]
    none = {"clip_sample": False} if "clip_sample" in inspect.signature(case.cls).parameters else {}
    return case.cls(**{**none, **case.config, **SETTINGS[process], **config})


def process_of(scheduler):
    return scheduler.config.get("process", "vp")


def stock_of(scheduler):
    """The stock scheduler of the same process, from the config."""
    names = {"vp": "DDIMScheduler", "flow": "FlowMatchEulerDiscreteScheduler", "edm": "EDMEulerScheduler"}
    cls = getattr(diffusers, names[process_of(scheduler)])
    return cls(**{k: scheduler.config[k] for k in inspect.signature(cls).parameters if k in scheduler.config})


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(scheduler, kind="epsilon", dtype=None):
    """What a model of data ~ N(0, 1/4) would put out, plus a ripple, in the parametrisation of `kind`.

    It is told only what a network is told: the scaled input and the time. `dtype` is that of its arithmetic.
    """
    process, data = process_of(scheduler), 0.25

    def epsilon(x, t):
        alpha = scheduler.alphas_cumprod[int(t)].to(x.dtype)
        return alpha, (1 - alpha).sqrt() * x / (alpha * data + 1 - alpha) + 0.05 * (3 * x + 0.01 * float(t)).sin()

    def predict(x, t):
        asked, x = x.dtype, x.to(dtype or x.dtype)
        if process == "flow":
            sigma = float(t) / 1000
            out = x * (sigma - data * (1 - sigma)) / (sigma**2 + data * (1 - sigma) ** 2) + 0.05 * (3 * x).sin()
        elif process == "edm":  # x is scaled by 1 / hypot(sigma, 1/2), which makes it the model's own: F = r x
            out = (0.3 * x + 0.05 * (3 * x + float(t)).sin()) * (-1 if kind == "v_prediction" else 1)
        else:
            alpha, out = epsilon(x, t)
            if kind == "sample":
                out = (x - (1 - alpha).sqrt() * out) / alpha.sqrt()
            elif kind == "v_prediction":
                out = alpha.sqrt() * out - (1 - alpha).sqrt() * (x - (1 - alpha).sqrt() * out) / alpha.sqrt()
        return out.to(asked)

    return predict


def run(scheduler, model, x, start=0, stop=None, **kwargs):
    """The loop of a pipeline, over the entries of `timesteps` themselves."""
    for t in scheduler.timesteps[start:stop]:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, return_dict=False, **kwargs)[0]
    return x


def relative(out, reference):
    out, reference = torch.as_tensor(out).double(), torch.as_tensor(reference).double()
    return ((out - reference).abs().max() / reference.abs().max()).item()


def visible(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


# ---------------------------------------------------------------- configs


@cache
def built(stock_name):
    """A stock scheduler with settings that are not its defaults, and those of them that it takes."""
    stock_class = getattr(diffusers, stock_name)
    settings = {**SD, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    settings = {k: v for k, v in settings.items() if k in inspect.signature(stock_class).parameters}
    return stock_class(**settings), settings


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
@pytest.mark.parametrize("stock_name", STOCK)
@pytest.mark.parametrize("name", CASES)
def test_the_schedule_of_every_compatible_stock_scheduler_is_taken_over_and_comes_back(
    name, stock_name, loaded, tmp_path, caplog
):
    stock, settings = built(stock_name)
    config = stock.config
    if loaded:
        stock.save_pretrained(tmp_path)
        config = type(stock).load_config(tmp_path)
    caplog.clear()
    ours = CASES[name].cls.from_config(config, clip_sample=False)
    assert caplog.records == []
    back = type(stock).from_config(ours.config) if "KDPM2" not in stock_name else ours  # that takes half a second
    for scheduler in (ours, back):
        assert torch.allclose(scheduler.alphas_cumprod.float(), stock.alphas_cumprod.float(), rtol=1e-4, atol=1e-7)
        assert {key: scheduler.config[key] for key in settings} == settings
    ours.set_timesteps(7)
    assert len(ours.timesteps) == 7 * ours.order
    assert stock_name in CASES[name].cls._compatibles


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
@pytest.mark.parametrize(
    ("process", "stock"),
    [
        ("flow", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
        ("flow", diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.2)),
        ("flow", diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
        (
            "flow",
            diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        ),
        ("flow", diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)),
        ("edm", diffusers.EDMEulerScheduler(sigma_max=60.0, sigma_data=1.0)),
        ("edm", diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("name", CASES)
def test_a_flow_or_edm_config_is_taken_over_or_refused(name, process, stock, loaded, tmp_path):
    cls, config = CASES[name].cls, stock.config
    if loaded:
        stock.save_pretrained(tmp_path)
        config = cls.load_config(tmp_path)
    else:
        config = {k: v for k, v in stock.config.items() if k not in ("_class_name", "_diffusers_version")}  # as if new
    if process not in CASES[name].processes:
        with pytest.raises(ValueError, match="flow-matching"):
            cls.from_config(config)
        return
    ours = cls.from_config(config)
    assert ours.config.process == process
    shared = set(visible(stock)) & set(inspect.signature(cls).parameters)
    shared -= set() if loaded else set(config["_use_default_values"])  # in diffusers defaults do not travel
    assert all(ours.config[key] == stock.config[key] for key in shared)
    assert ours.config.shift == stock.config.get("flow_shift", stock.config.get("shift", 1.0))
    mu = {"mu": 1.0} if stock.config.get("use_dynamic_shifting") else {}
    ours.set_timesteps(10, **mu)
    if type(stock).__name__ in ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"):
        stock.set_timesteps(10, **mu)
        assert ours.timesteps[:: ours.order].tolist() == stock.timesteps.tolist()
    back = type(stock).from_config(ours.config)
    assert {key: back.config[key] for key in visible(stock)} == visible(stock)


@pytest.mark.parametrize("process", ["flow", "edm"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.processes == ("vp",)])
def test_a_flow_or_edm_config_of_one_of_ours_is_refused_too(name, process):
    with pytest.raises(ValueError, match="needs a schedule of betas"):
        CASES[name].cls.from_config(make("BDIA", process).config)


@pytest.mark.parametrize("stock", ["IPNDM", "ScoreSdeVe", "CMStochasticIterative", "SCM", "UnCLIP", "CogVideoXDDIM"])
@pytest.mark.parametrize("name", CASES)
def test_the_config_of_another_process_is_refused(name, stock, tmp_path):
    scheduler = getattr(diffusers, f"{stock}Scheduler")()
    with pytest.raises(ValueError, match="noise schedule of this config.* is not one of"):
        CASES[name].cls.from_config(scheduler.config)  # which knows no name before it is saved
    scheduler.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"noise schedule of {stock}Scheduler.* is not one of"):
        CASES[name].cls.from_config(type(scheduler).load_config(tmp_path))


@pytest.mark.parametrize(
    ("stock", "settings"),
    [
        ("FlowMatchEulerDiscrete", {"invert_sigmas": True}),
        ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}),
        ("EulerDiscrete", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_a_setting_that_changes_the_process_is_refused(name, stock, settings):
    config = getattr(diffusers, f"{stock}Scheduler")(**settings).config
    with pytest.raises(ValueError, match=f"with {next(iter(settings))}=.* is not one of"):
        CASES[name].cls.from_config(config)


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
@pytest.mark.parametrize("other", CASES)
@pytest.mark.parametrize("name", CASES)
def test_settings_of_another_of_ours_are_not_taken_for_its_own(name, other, loaded, tmp_path):
    cls = CASES[other].cls
    extra = {"solver": "s_pndm", "released": True, "mode": "pnm"} if cls is TimeShiftScheduler else {}
    extra = {"released": True} if cls in (BELMScheduler, EDICTScheduler) else extra
    given = make(other, **{"beta_end": 0.013, **CASES[other].config, **extra, "prediction_type": "v_prediction"})
    config = given.config
    if loaded:
        given.save_pretrained(tmp_path)
        config = cls.load_config(tmp_path)
    taken = CASES[name].cls.from_config(config)
    assert taken.config.beta_end == 0.013 and taken.config.prediction_type == "v_prediction"
    if CASES[name].cls is cls:
        assert visible(taken) == visible(given)
    else:
        assert not taken.config.get("released") and taken.config.get("solver") in (None, "ddim", "euler")
    taken.set_timesteps(6)


@pytest.mark.parametrize("loaded", [False, True], ids=["from_config", "from_pretrained"])
@pytest.mark.parametrize(("name", "process"), RUNS)
def test_a_copy_by_config_or_by_folder_is_the_same_scheduler(name, process, loaded, tmp_path):
    scheduler = make(name, process, num_train_timesteps=900)
    if loaded:
        scheduler.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "scheduler_config.json").read_text())
        assert stored["_class_name"] == type(scheduler).__name__
    copy = type(scheduler).from_pretrained(tmp_path) if loaded else type(scheduler).from_config(scheduler.config)
    assert visible(copy) == visible(scheduler)
    outs = []
    for s in (scheduler, copy):
        s.set_timesteps(8)
        outs.append(run(s, network(s), noise(2, 4, 4, 4)))
    assert torch.equal(*outs)


@pytest.mark.parametrize("name", CASES)
def test_every_argument_of_the_config_survives_both_ways(name, tmp_path):
    scheduler = make(name)
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: 0.9 * v}
    keep = ("clip_sample", "thresholding", "exact", "released", "rescale_betas_zero_snr")  # not all go together
    config = {
        key: other[type(value)](value)
        for key, value in visible(scheduler).items()
        if type(value) in other and value and key not in keep
    }
    changed = type(scheduler)(**{**visible(scheduler), **config})
    changed.save_pretrained(tmp_path)
    for again in (type(scheduler).from_pretrained(tmp_path), type(scheduler).from_config(changed.config)):
        assert visible(again) == visible(changed) == {**visible(scheduler), **config}


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", CASES)
def test_times_are_those_of_stock_ddim_for_any_number_of_steps(name, spacing):
    scheduler = make(name, timestep_spacing=spacing, steps_offset=1)
    stock = stock_of(scheduler)
    for steps in range(2, 61):
        for s in (scheduler, stock):
            s.set_timesteps(steps)
        assert scheduler.timesteps[:: scheduler.order].tolist() == stock.timesteps.tolist()
        assert scheduler.timesteps.dtype == torch.int64 and scheduler.num_inference_steps == steps


@pytest.mark.parametrize(("name", "process"), [pair for pair in PROCESSES if pair[1] != "vp"])
def test_times_of_flows_and_edm_are_those_of_stock_for_any_number_of_steps(name, process):
    scheduler = make(name, process)
    stock = stock_of(scheduler)
    for steps in range(2, 61):
        for s in (scheduler, stock):
            s.set_timesteps(steps)
        assert torch.equal(scheduler.timesteps[:: scheduler.order], stock.timesteps)
        assert torch.equal(scheduler.sigmas, stock.sigmas)
        assert scheduler.timesteps.dtype == torch.float32 and scheduler.num_inference_steps == steps


@pytest.mark.parametrize("name", CASES)
def test_custom_times_are_taken_as_given(name):
    scheduler, times = make(name), [901, 640, 250, 7]
    for given in (times, torch.tensor(times)):
        scheduler.set_timesteps(timesteps=given)
        assert scheduler.timesteps[:: scheduler.order].tolist() == times
        assert set(scheduler.timesteps.tolist()) == set(times)
        scheduler.timesteps[0] = 900  # a pipeline's writes do not reach the caller's list
        assert list(given) == times and scheduler.num_inference_steps == 4


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "flow" in case.processes])
def test_custom_noise_levels_are_those_of_stock(name):
    sigmas = [1.0, 0.7, 0.35, 0.1]
    for process, config, given in [
        ("flow", {"shift": 3.0}, {"sigmas": sigmas}),
        ("flow", {"shift": 3.0, "shift_terminal": 0.05}, {"sigmas": sigmas}),
        ("flow", {"use_dynamic_shifting": True}, {"sigmas": sigmas, "mu": 0.8}),
        ("flow", {"shift": 1.0}, {"timesteps": [1000.0, 700.0, 350.0, 100.0]}),
    ]:
        scheduler = make(name, process, **config)
        stock = stock_of(scheduler)
        for s in (scheduler, stock):
            s.set_timesteps(**given)
        assert torch.equal(scheduler.timesteps[:: scheduler.order], stock.timesteps)
        assert torch.equal(scheduler.sigmas, stock.sigmas)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "edm" in case.processes])
def test_the_noise_levels_of_an_edm_run_may_be_given(name):
    scheduler, sigmas = make(name, "edm"), [60.0, 7.0, 1.0, 0.1]
    for given in (sigmas, torch.tensor(sigmas)):
        scheduler.set_timesteps(sigmas=given)
        assert scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0.0])
        assert scheduler.timesteps[:: scheduler.order].tolist() == pytest.approx([math.log(s) / 4 for s in sigmas])
    for wrong in ([7.0, 60.0], [7.0, 0.0], [], [7.0, 7.0]):
        with pytest.raises(ValueError, match="must"):
            scheduler.set_timesteps(sigmas=wrong)
    with pytest.raises(ValueError, match="one for each step"):
        scheduler.set_timesteps(3, sigmas=sigmas)


@pytest.mark.parametrize(("name", "process"), PROCESSES)
def test_times_live_on_the_device_that_was_asked_for(name, process):
    scheduler = make(name, process)
    for device in ("meta", torch.device("meta"), "cpu", None):
        scheduler.set_timesteps(5, device=device)
        assert scheduler.timesteps.device.type == (str(device) if device else "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass"),
        ({"num_inference_steps": 3, "timesteps": [5, 3, 1]}, "pass"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"timesteps": []}, "at least"),
        ({"timesteps": [[600, 300, 1]]}, "flat list"),
        ({"timesteps": [1, 300, 600]}, "fall strictly"),
        ({"timesteps": [600, 600, 1]}, "fall strictly"),
        ({"timesteps": [600.5, 300, 1]}, "whole"),
        ({"timesteps": [1000, 300, 1]}, "must lie in"),
        ({"timesteps": [600, 300, -1]}, "must lie in"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_impossible_times_are_refused_with_the_reason(name, arguments, message):
    if not arguments and not CASES[name].times_asked:
        make(name).set_timesteps()
        return
    with pytest.raises(ValueError, match=message):
        make(name).set_timesteps(**arguments)


@pytest.mark.parametrize("give", ["views", "views, index", "numbers", "numbers, index"])
@pytest.mark.parametrize(("name", "process"), RUNS)
def test_a_run_that_begins_in_the_middle_is_a_run_over_the_rest(name, process, give):
    scheduler, x = make(name, process), noise(1, 4, 4, 4)
    scheduler.set_timesteps(9)
    begin, times = 4 * scheduler.order, scheduler.timesteps.tolist()
    if "index" in give:
        scheduler.set_begin_index(begin)
        assert scheduler.begin_index == begin
    out = x
    for index in range(begin, len(times)):
        t = scheduler.timesteps[index] if "views" in give else scheduler.timesteps[index].item()
        out = scheduler.step(network(scheduler)(scheduler.scale_model_input(out, t), t), t, out).prev_sample
    assert scheduler.step_index == len(times)
    rest = make(name, process, **({"shift": 1.0} if process == "flow" else {}))
    if process == "vp":
        rest.set_timesteps(timesteps=times[begin :: scheduler.order])
    else:
        rest.set_timesteps(sigmas=scheduler.sigmas[4:-1])
    assert relative(out, run(rest, network(rest), x)) < (1e-12 if process == "vp" else 1e-6)  # times are float32


@pytest.mark.parametrize(("name", "process"), RUNS)
def test_the_first_step_may_be_found_by_its_time_alone(name, process):
    scheduler, x = make(name, process), noise(1, 4, 4, 4)
    scheduler.set_timesteps(9)
    scheduler.step(0.5 * x, scheduler.timesteps[3 * scheduler.order].item(), x)
    assert scheduler.step_index == 3 * scheduler.order + 1


# ---------------------------------------------------------------- the rest of the interface


@pytest.mark.parametrize(("name", "process"), PROCESSES)
def test_order_length_and_first_noise_are_those_of_stock(name, process):
    scheduler = make(name, process)
    stock = stock_of(scheduler)
    assert len(scheduler) == scheduler.config.num_train_timesteps == 1000
    assert scheduler.timesteps.shape[0] == 1000  # before `set_timesteps`
    sigma = 1.0 if process == "flow" else float(stock.init_noise_sigma)
    assert float(scheduler.init_noise_sigma) == pytest.approx(sigma)
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 10 * scheduler.order
    assert "Scheduler" in type(scheduler).__name__
    parameters = {m: set(inspect.signature(getattr(scheduler, m)).parameters) for m in ("step", "set_timesteps")}
    assert {"model_output", "timestep", "sample", "eta", "generator", "return_dict"} <= parameters["step"]
    assert {"num_inference_steps", "device", "timesteps"} <= parameters["set_timesteps"]


@pytest.mark.parametrize(("name", "process"), PROCESSES)
def test_the_input_of_the_network_is_scaled_as_in_stock(name, process):
    scheduler, x = make(name, process), noise(3, 4, 4, 4, dtype=torch.float32)
    stock = stock_of(scheduler)
    assert scheduler.scale_model_input(x, 0.0) is x  # diffusers asks before `set_timesteps`
    for s in (scheduler, stock):
        s.set_timesteps(6)
    for t, again in zip(stock.timesteps, scheduler.timesteps[:: scheduler.order], strict=True):
        stock._step_index = None
        expected = stock.scale_model_input(x, t) if process == "edm" else x
        assert torch.allclose(scheduler.scale_model_input(x, again), expected, rtol=1e-6)
        assert scheduler.scale_model_input(x.half(), again).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "process"), PROCESSES)
def test_noise_is_added_as_in_stock(name, process, dtype):
    scheduler = make(name, process)
    stock = stock_of(scheduler)
    for s in (scheduler, stock):
        s.set_timesteps(6)
    x, z = noise(3, 4, 4, 4, dtype=dtype), noise(3, 4, 4, 4, seed=1, dtype=dtype)
    times = stock.timesteps[[0, 2, 5]]
    if process == "flow":
        expected = stock.scale_noise(x, times, z)
        assert torch.equal(scheduler.scale_noise(x, times, z), scheduler.add_noise(x, z, times))
    else:
        expected = stock.add_noise(x, z, times)
    ours = scheduler.add_noise(x, z, times)
    assert ours.dtype == dtype and ours.shape == x.shape
    assert relative(ours, expected) < 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    one = scheduler.add_noise(x, z, times[1:2])
    assert torch.equal(one[1], ours[1])


@pytest.mark.parametrize("name", CASES)
def test_velocities_for_training_are_those_of_stock(name):
    scheduler, x, z, t = make(name), noise(3, 4, 4, 4), noise(3, 4, 4, 4, seed=1), torch.tensor([0, 500, 999])
    assert relative(scheduler.get_velocity(x, z, t), stock_of(scheduler).get_velocity(x, z, t)) < 1e-6


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("name", "process"), RUNS)
def test_one_denoiser_gives_one_result_whatever_it_is_said_to_predict(name, process, inverse):
    if process == "flow" or (inverse and not CASES[name].undone):
        pytest.skip("a flow has one parametrisation, and this scheduler one direction")
    outs, clean, x = [], [], noise(2, 4, 4, 4)
    for kind in ("epsilon", "v_prediction") if process == "edm" else ("epsilon", "sample", "v_prediction"):
        config = {"timestep_spacing": "trailing", "prediction_type": kind, **({"inverse": True} if inverse else {})}
        scheduler = make(name, process, **config)
        scheduler.set_timesteps(12)
        model = network(scheduler, kind)
        t = scheduler.timesteps[0]
        clean.append(scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).pred_original_sample)
        scheduler.set_timesteps(12)
        outs.append(run(scheduler, model, x))
    assert all(relative(out, outs[0]) < 1e-9 for out in outs)
    assert all(relative(one, clean[0]) < 1e-9 for one in clean)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ALONE)
def test_the_predicted_clean_sample_is_what_the_output_stands_for(name, kind):
    scheduler, x, output = make(name, prediction_type=kind), noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=1)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[0]
    clean, _ = split_prediction(kind, output, x, scheduler.alphas_cumprod[t])
    assert relative(scheduler.step(output, t, x).pred_original_sample, clean) < 1e-12


@pytest.mark.parametrize(("name", "process"), RUNS)
def test_a_tuple_holds_what_the_output_holds(name, process):
    outs, x = [], noise(1, 4, 4, 4)
    for return_dict in (False, True):
        scheduler = make(name, process)
        scheduler.set_timesteps(5)
        outs.append(scheduler.step(0.5 * x, scheduler.timesteps[0], x, return_dict=return_dict))
    assert isinstance(outs[0], tuple) and torch.equal(outs[0][0], outs[1].prev_sample)
    assert torch.equal(outs[1][0], outs[1].prev_sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "process"), RUNS)
def test_samples_keep_their_dtype_and_inputs_their_values(name, process, dtype):
    scheduler, x, output = make(name, process), noise(2, 4, 4, 4, dtype=dtype), noise(2, 4, 4, 4, seed=1, dtype=dtype)
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps:
        before = x.clone(), output.clone()
        result = scheduler.step(output, t, x)
        assert torch.equal(x, before[0]) and torch.equal(output, before[1])
        assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
        x = result.prev_sample
    assert torch.isfinite(x).all()


@pytest.mark.parametrize(("name", "process"), RUNS)
def test_a_batch_is_so_many_single_samples(name, process):
    if not CASES[name].independent:
        pytest.skip("its samples share a time")
    scheduler, x = make(name, process), noise(3, 4, 4, 4)
    scheduler.set_timesteps(8)
    together = run(scheduler, network(scheduler), x)
    for k in range(3):
        scheduler.set_timesteps(8)
        assert torch.equal(run(scheduler, network(scheduler), x[k : k + 1]), together[k : k + 1])


@pytest.mark.parametrize("shape", [(2, 5), (1, 16, 8), (2, 3, 4, 4, 4)], ids=str)
@pytest.mark.parametrize("name", ALONE)
def test_samples_of_any_shape_are_stepped(name, shape):
    scheduler = make(name)
    scheduler.set_timesteps(4)
    assert run(scheduler, network(scheduler), noise(*shape)).shape == shape


@pytest.mark.parametrize("numbers", [False, True], ids=["views", "numbers"])
@pytest.mark.parametrize(("name", "process"), RUNS)
def test_runs_repeat_to_the_bit_even_after_an_interrupted_one(name, process, numbers):
    scheduler, outs = make(name, process), []
    for stop in (None, None, 3, None, 4, "other shape", None):
        scheduler.set_timesteps(7)
        x = noise(2, 4, 4, 4) if stop != "other shape" else noise(1, 4, 8, 8)
        for t in scheduler.timesteps[: stop if isinstance(stop, int) else None]:
            time = t.item() if numbers else t
            model_input = scheduler.scale_model_input(x, time)
            x = scheduler.step(network(scheduler)(model_input, time), time, x, return_dict=False)[0]
        outs += [x] if stop is None else []
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(("name", "process"), [(n, p) for n, p in RUNS if n != "TimeShift"])
def test_a_loop_started_again_without_set_timesteps_is_a_new_run(name, process):
    scheduler, x = make(name, process), noise(2, 4, 4, 4)
    scheduler.set_timesteps(7)
    first = run(scheduler, network(scheduler), x)
    assert torch.equal(run(scheduler, network(scheduler), x), first)


@pytest.mark.parametrize("name", ALONE)
def test_it_works_under_inference_mode(name):
    scheduler, x = make(name), noise(2, 4, 4, 4)
    scheduler.set_timesteps(7)
    expected = run(scheduler, network(scheduler), x)
    with torch.inference_mode():
        scheduler.set_timesteps(7)
        assert torch.equal(run(scheduler, network(scheduler), x), expected)


@pytest.mark.parametrize("name", ALONE)
def test_gradients_reach_the_first_sample(name):
    scheduler, x = make(name), noise(1, 4, 4, 4).requires_grad_()
    if scheduler.config.get("exact"):
        pytest.skip("integers have no gradient")
    scheduler.set_timesteps(4)
    run(scheduler, network(scheduler), x).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


def test_stepping_before_set_timesteps_is_refused():
    x = noise(1, 4, 4, 4)
    for name in CASES:
        with pytest.raises(ValueError, match="`set_timesteps` before `step`"):
            make(name).step(x, 0, x)


@pytest.mark.parametrize("name", CASES)
def test_a_prediction_of_another_shape_is_refused(name):
    scheduler, x = make(name), noise(2, 4, 4, 4)
    if name == "DDCM":
        scheduler.set_source(x[:1])
    scheduler.set_timesteps(4)
    for output in (x[:1], noise(2, 8, 4, 4)):
        with pytest.raises(ValueError, match="`model_output` must have the shape of `sample`"):
            scheduler.step(output, scheduler.timesteps[0], x)


@pytest.mark.parametrize("name", UNDONE)
def test_a_scheduler_that_can_be_undone_refuses_eta(name):
    scheduler, x = make(name), noise(1, 4, 4, 4)
    scheduler.set_timesteps(4)
    for eta in (0.1, -1.0):
        with pytest.raises(ValueError, match="eta must be 0"):
            scheduler.step(x, scheduler.timesteps[0], x, eta=eta)


@pytest.mark.parametrize("name", CASES)
def test_betas_that_are_too_few_are_refused(name):
    with pytest.raises(ValueError, match="`trained_betas` must hold `num_train_timesteps` = 1000 numbers"):
        make(name, trained_betas=[0.01] * 999)


@pytest.mark.parametrize("name", UNDONE)
def test_a_pair_of_a_longer_run_is_refused(name):
    scheduler, x = make(name, inverse=True), noise(1, 4, 4, 4)
    scheduler.set_timesteps(8)
    run(scheduler, network(scheduler), x)
    sampler = make(name)
    start = sampler.set_pair(scheduler.pair)
    sampler.set_timesteps(6)
    with pytest.raises(ValueError, match="comes from a run of 8 steps, and this one has 6"):
        run(sampler, network(sampler), start)


def test_an_inversion_that_loses_the_way_back_says_so(caplog):
    for config, lost in (({"gamma": 0.5}, True), ({"gamma": 1.0}, False), ({"gamma": 0.5, "exact": True}, False)):
        caplog.clear()
        scheduler = BDIAScheduler(**SD, inverse=True, **config)
        scheduler.set_timesteps(30 if config.get("exact") and lost else 12 if config.get("exact") else 50)
        assert any("the round trip will be off" in r.getMessage() for r in caplog.records) == lost


@pytest.mark.parametrize("config", [{"clip_sample": True}, {"thresholding": True}], ids=str)
@pytest.mark.parametrize("name", UNDONE)
def test_a_scheduler_that_can_be_undone_refuses_to_clip(name, config):
    scheduler = CASES[name].cls.from_config(diffusers.DDIMScheduler(clip_sample=False).config, **config)
    with pytest.raises(ValueError, match=f"{next(iter(config))}.*can't be undone"):
        scheduler.set_timesteps(10)


@pytest.mark.parametrize(
    "config",
    [{"beta_schedule": "sigmoid"}, {"prediction_type": "flow_prediction"}, {"timestep_spacing": "quad"}],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_an_impossible_config_is_refused_with_the_reason(name, config):
    with pytest.raises(ValueError, match=f"`{next(iter(config))}` must be one of"):
        make(name, **config)


# ---------------------------------------------------------------- neighbours


def ddim_by_hand(scheduler, z, x, final):
    """DDIM between the times of the schedule, for a noise that depends on the time alone."""
    times = scheduler.timesteps[:: scheduler.order].tolist()
    alphas = [*scheduler.alphas_cumprod[times].tolist(), final]
    for time, a, b in zip(times, alphas, alphas[1:], strict=False):
        eps = math.cos(time / 300) * z
        x = math.sqrt(b / a) * (x - math.sqrt(1 - a) * eps) + math.sqrt(1 - b) * eps
    return x


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", DDIM)
def test_every_step_goes_from_a_time_of_the_schedule_to_the_next(name, spacing, to_one):
    x, z = noise(1, 1, 2, 4), noise(1, 1, 2, 4, seed=1)
    config = {"timestep_spacing": spacing, "set_alpha_to_one": to_one, **CASES[name].ddim}
    scheduler = make(name, **config)
    final = 1.0 if to_one else scheduler.alphas_cumprod[0].item()
    for steps in range(2, 61):
        scheduler.set_timesteps(steps)
        expected = ddim_by_hand(scheduler, z, x, final)
        assert relative(run(scheduler, lambda _, t: math.cos(float(t) / 300) * z, x), expected) < 1e-12


# ---------------------------------------------------------------- no waiting for the device


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is brought to the host, which on an accelerator stalls the queue."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "process"), RUNS)
def test_no_step_but_the_last_reads_a_value_back_from_the_device(name, process):
    scheduler, x = make(name, process), noise(2, 4, 4, 4)
    if scheduler.config.get("exact"):
        pytest.skip("on the CPU the grid is watched at every step; see the next test")
    scheduler.set_timesteps(6)
    for index, t in enumerate(scheduler.timesteps):
        with CountReads() as counter:
            output = 0.5 * scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        assert counter.reads <= (index + 1 == len(scheduler.timesteps) and not CASES[name].undone)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("name", "process"), [pair for pair in PROCESSES if CASES[pair[0]].undone])
def test_a_run_needs_no_value_of_any_tensor(name, process, inverse):
    scheduler, x = make(name, process, inverse=inverse), torch.empty(2, 4, 4, 4, device="meta")
    scheduler.set_timesteps(6, device="meta")  # tensors without values: reading one is an error
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps[:-1]:
        output = scheduler.scale_model_input(torch.empty_like(x), t)
        x = scheduler.step(output, t, x.clone(), return_dict=False)[0]
    assert scheduler.step_index == len(scheduler.timesteps) - 1


# ---------------------------------------------------------------- latents that were changed between steps


def new_tensor(x):
    return x + 1e-3


def in_place(x):
    x[0, 0, 0, 0] += 1e-3
    return x


def unchanged(x):
    return x.clone()


@pytest.mark.parametrize("edit", [new_tensor, in_place, unchanged])
@pytest.mark.parametrize("at", [0, 1, 2, 5])
@pytest.mark.parametrize("name", UNDONE)
def test_latents_changed_behind_its_back_are_an_error_and_copies_are_not(name, at, edit):
    scheduler, x = make(name), noise(1, 4, 4, 4)
    scheduler.set_timesteps(8)
    model = network(scheduler)
    expected = run(scheduler, model, x)
    for changed in (edit, None):  # the error leaves no trace
        scheduler.set_timesteps(8)
        y, error = x, None
        for index, t in enumerate(scheduler.timesteps):
            try:
                y = scheduler.step(model(y, t), t, y).prev_sample
            except ValueError as raised:
                error = str(raised)
                assert index == at + 1  # with the step that is handed the changed ones
                break
            y = changed(y) if changed and index == at else y
        if changed in (None, unchanged):
            assert error is None and torch.equal(y, expected)
        else:
            assert "changed between two steps" in error and type(scheduler).__name__ in error


@pytest.mark.parametrize("name", [name for name in UNDONE if not CASES[name].config.get("exact")])
def test_adopting_changed_latents_goes_on_from_them(name):
    scheduler, x = make(name, on_edit="adopt", timestep_spacing="trailing"), noise(2, 4, 4, 4)
    model, outs = network(scheduler), []
    for edit in (unchanged, new_tensor):
        scheduler.set_timesteps(8)
        y = x
        for t in scheduler.timesteps:
            y = edit(scheduler.step(model(y, t), t, y).prev_sample)
        outs.append(y)
    scheduler.set_timesteps(8)
    assert torch.equal(run(scheduler, model, x), outs[0])
    assert 1e-4 < relative(outs[1], outs[0]) < 1


# ---------------------------------------------------------------- stock pipelines

CALLS = {"sd": {"guidance_scale": 5.0}, "sdxl": {"guidance_scale": 5.0}, "flux": {"guidance_scale": 1.0}}
FLOWS, CLEAN = ("sd3", "flux"), {"clip_sample": False}
SUPPORTED = [
    (name, kind)
    for name, case in CASES.items()
    for kind in (
        "sd", "sd img2img", "sd inpaint", "sdxl", "sdxl img2img", "sdxl, edm", "sd3", "sd3 img2img", "flux",
        "flux img2img", "ddim pixels", "ddpm pixels",
    )
    if case.alone
    and ("flow" in case.processes or not kind.startswith(FLOWS))
    and ("edm" in case.processes or "edm" not in kind)
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), SUPPORTED)
def test_every_stock_pipeline_runs_and_tells_the_network_the_times_of_the_schedule(name, kind, tiny):
    case = CASES[name]
    pipe = tiny(kind, case.cls, **case.config, **(CLEAN if "pixels" in kind else {}))
    scheduler, options = pipe.pipe.scheduler, {}
    if kind == "flux img2img":  # the pipeline takes calls for steps, see the docstring of EDICTScheduler
        options = {"strength": 1 - (1 - pipe.kind.strength) / scheduler.order}
    out, seen = pipe(steps=6, **options)
    times = scheduler.timesteps.tolist()
    begin = len(times) - len(seen)
    assert begin % scheduler.order == 0 and (begin > 0) == ("img2img" in kind or "inpaint" in kind)
    assert seen == pytest.approx([t / 1000 if "flux" in kind else t for t in times[begin:]], rel=1e-5)
    if pipe.kind.strength == 0.6:
        assert len(seen) == scheduler.order * (4 if kind.startswith(FLOWS) else 3)
    assert torch.isfinite(out).all()
    again, _ = pipe(steps=6, **options)
    assert torch.equal(again, out)


@pytest.mark.parametrize("kind", ["sd", "sd img2img", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("name", ALONE)
def test_an_interrupted_pipeline_leaves_no_trace(name, kind, tiny):
    if kind.startswith(FLOWS) and "flow" not in CASES[name].processes:
        pytest.skip("not for flows")
    pipe = tiny(kind, CASES[name].cls, **CASES[name].config)
    out, seen = pipe(steps=4)

    def interrupt(pipe, index, t, kwargs):
        pipe._interrupt = index == 1
        return kwargs

    assert len(pipe(steps=4, callback_on_step_end=interrupt)[1]) == 2
    again, seen_again = pipe(steps=4)
    assert torch.equal(again, out) and seen_again == seen


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("name", UNDONE)
def test_a_callback_that_changes_the_latents_is_an_error_and_one_that_reads_them_is_not(name, kind, tiny):
    pipe = tiny(kind, CASES[name].cls, **CASES[name].config)
    out, _ = pipe(steps=4)

    def scale(pipe, index, t, kwargs):
        return {"latents": kwargs["latents"] * 1.01}

    def write(pipe, index, t, kwargs):
        kwargs["latents"].mul_(1.01)
        return {}

    def read(pipe, index, t, kwargs):
        return kwargs

    for change in (scale, write):
        with pytest.raises(ValueError, match="latents were changed between two steps"):
            pipe(steps=4, callback_on_step_end=change)
    assert torch.equal(pipe(steps=4, callback_on_step_end=read)[0], out)


@pytest.mark.parametrize("name", ALONE)
def test_inpainting_with_four_channels_is_refused_or_adopted(name, tiny):
    case = CASES[name]
    if case.undone:
        with pytest.raises(ValueError, match="on_edit='adopt'"):
            tiny("sd inpaint, 4 channels", case.cls, **case.config)(steps=4)
        if case.config.get("exact"):
            return
    pipe = tiny("sd inpaint, 4 channels", case.cls, **case.config, **({"on_edit": "adopt"} if case.undone else {}))
    out, seen = pipe(steps=4)
    assert torch.isfinite(out).all() and len(seen) == 4 * pipe.pipe.scheduler.order


@pytest.mark.parametrize("name", ALONE)
def test_sdxl_may_stop_early_and_a_refiner_goes_on(name, tiny):
    case = CASES[name]
    base = tiny("sdxl", case.cls, **case.config)
    latents, seen = base(steps=8, denoising_end=0.5)
    order = base.pipe.scheduler.order
    assert len(seen) == 4 * order and seen == base.pipe.scheduler.timesteps.tolist()[: 4 * order]
    refiner = tiny("sdxl img2img", case.cls, **case.config)
    if order == 2:  # the pipeline assumes Heun's 2 N - 1 times
        with pytest.raises(ValueError, match="in the middle of one"):
            refiner(steps=8, denoising_start=0.5, image=latents)
        return
    out, rest = refiner(steps=8, denoising_start=0.5, image=latents)
    assert len(rest) == 4 * order and rest[0] == 376
    assert torch.isfinite(out).all()


def test_a_compiled_denoiser_is_compiled_once_for_all_schedulers(tiny):
    pipe, counter = tiny("sd", BDIAScheduler), CompileCounter()
    compiled = torch.compile(pipe.pipe.unet, backend=counter)
    for case in (CASES[name] for name in ALONE):
        pipe = tiny("sd", case.cls, **case.config)
        expected, _ = pipe(steps=4)
        pipe.pipe.unet, denoiser = compiled, pipe.pipe.unet
        seed = torch.Generator().manual_seed(0)
        images = pipe.pipe(**pipe.kind.call, num_inference_steps=4, generator=seed, output_type="latent").images
        pipe.pipe.unet = denoiser
        assert relative(images, expected) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ALONE)
def test_several_images_for_a_prompt_are_those_of_single_calls(name, tiny):
    if not CASES[name].independent:
        pytest.skip("its samples share a time")
    pipe = tiny("sd", CASES[name].cls, **CASES[name].config)
    x = noise(3, 4, 8, 8, dtype=torch.float32)
    seeds = [torch.Generator().manual_seed(k) for k in range(3)]
    together, _ = pipe(steps=4, latents=x, num_images_per_prompt=3, generator=seeds)
    for k in range(3):
        assert relative(pipe(steps=4, latents=x[k : k + 1], seed=k)[0], together[k : k + 1]) < 1e-4


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", [kind for name, kind in SUPPORTED if name == "EditFriendlyDDPM"])
def test_ddcm_edits_in_every_stock_pipeline(kind, eta, tiny):
    pipe = tiny(kind, DDCMScheduler, original_inference_steps=None)
    source = noise(*pipe.kind.shape, dtype=torch.float32)
    if eta == 0 and kind == "ddpm pixels":
        pytest.skip("the pipeline knows no eta, and the scheduler's own is 1")
    pipe.pipe.scheduler.set_source(source)
    # Two branches, source and target: the same noise, the prompts' embeddings one after the other.
    both = {key: torch.cat([value, -value]) for key, value in pipe.kind.call.items() if "embeds" in key}
    both |= {key: torch.cat([pipe.kind.call[key]] * 2) for key in ("image", "mask_image") if key in pipe.kind.call}
    both |= {} if kind == "ddpm pixels" else {"eta": eta}
    both |= {"batch_size": 2} if "pixels" in kind else {}
    outs = []
    for _ in range(2):
        out, seen = pipe(steps=6, generator=[torch.Generator().manual_seed(0) for _ in range(2)], **both)
        outs.append(out)
    times = pipe.pipe.scheduler.timesteps.tolist()
    assert seen == times[len(times) - len(seen) :] and len(seen) == (3 if pipe.kind.strength == 0.6 else 6)
    assert torch.equal(*outs) and torch.isfinite(outs[0]).all()
    drawn = source if "pixels" not in kind else (source / 2 + 0.5).clamp(0, 1)
    assert relative(outs[0][:1], drawn) < 1e-6
    if "pixels" not in kind:  # an unconditional model can't tell the branches apart
        assert relative(outs[0][1:], drawn) > 1e-3


# ---------------------------------------------------------------- from the Hub, without this package


def imported(path):
    """The files of its folder that a file imports itself; whatever else it imports is there without this package."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "numpy", "torch", "diffusers"}
    return {path.with_name(f"{node.module}.py") for node in nodes if isinstance(node, ast.ImportFrom) and node.level}


def siblings(path):
    """A file and all that it needs from its folder."""
    found, todo = set(), {path}
    while todo:
        file = todo.pop()
        found.add(file)
        todo |= imported(file) - found
    return found


def test_schedulers_load_from_a_pipeline_repository_where_this_package_is_not_installed(tiny, tmp_path):
    """Each with the files it needs in the repository's scheduler folder, in a fresh process."""
    tiny("ddpm pixels", BDIAScheduler, **CLEAN).pipe.save_pretrained(tmp_path / "stock")
    expected = {}
    for cls in dict.fromkeys(CASES[name].cls for name in ALONE):
        folder, file = tmp_path / cls.__name__, Path(inspect.getfile(cls))
        shutil.copytree(tmp_path / "stock", folder)
        alone = {"guidance_scale": 0.0} if cls is MinorityGuidanceScheduler else {}
        pipe = tiny("ddpm pixels", cls, **CLEAN, **alone)
        pipe.pipe.scheduler.save_pretrained(folder / "scheduler")
        assert siblings(file) == {file, *imported(file)}  # diffusers carries along no more than the direct imports
        for source in siblings(file):
            shutil.copy(source, folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = [file.stem, cls.__name__]
        (folder / "model_index.json").write_text(json.dumps(index))
        expected[cls.__name__] = pipe(steps=4)[0].double().sum().item()
    script = textwrap.dedent("""
        import json, shutil, sys
        sys.modules["sfumato"] = None  # importing it fails
        import torch
        from diffusers import DiffusionPipeline
        from diffusers.utils.constants import HF_MODULES_CACHE
        torch.set_num_threads(1)
        for name in sys.argv[2:]:
            shutil.rmtree(f"{HF_MODULES_CACHE}/diffusers_modules", ignore_errors=True)  # what others brought
            for module in [module for module in sys.modules if module.startswith("diffusers_modules")]:
                del sys.modules[module]
            pipe = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True)
            assert type(pipe.scheduler).__name__ == name, type(pipe.scheduler)
            pipe.set_progress_bar_config(disable=True)
            out = pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
            print(json.dumps([name, out.double().sum().item()]))
    """)
    environment = {
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    arguments = [sys.executable, "-c", script, str(tmp_path), *expected]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert results == pytest.approx(expected, rel=1e-5)
