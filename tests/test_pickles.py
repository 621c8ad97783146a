"""Models in pickled files (.ckpt): what is read from them, and that nothing in them runs."""

import os
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from models import TINY, assert_equal_modules
from safetensors.torch import load_file

from trainer.errors import UserError
from trainer.formats import architectures, origin, weights

FP32 = torch.float32


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "of before torch 1.6"])
def test_a_ckpt_is_read_with_the_names_of_2022_too(sd15, files, tmp_path, monkeypatch, is_zip):
    """A .ckpt does not state its architecture; here the small model's counts as the published."""
    folder = origin.at(str(sd15))
    monkeypatch.setattr(architectures, "config", lambda kind, part: folder.config(part))
    old = {
        name.replace("transformer.text_model.", "transformer."): tensor
        for name, tensor in load_file(files["sd15"]).items()
    }
    assert "cond_stage_model.transformer.final_layer_norm.bias" in old
    path = tmp_path / "model.ckpt"
    held = {"state_dict": old, "global_step": 3}
    torch.save(held, path, _use_new_zipfile_serialization=is_zip)
    found = origin.at(str(path))
    for part in ("unet", "vae", "text_encoder"):
        assert_equal_modules(found.load(part, FP32), folder.load(part, FP32))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".SafeTensors"])
def test_a_file_is_read_by_what_it_begins_with_and_not_by_its_name(files, tmp_path, suffix, caplog):
    caplog.set_level("INFO")
    path = Path(shutil.copy(files["sdxl"], tmp_path / f"model{suffix}"))
    found = origin.at(str(path)).load("unet", FP32)
    assert_equal_modules(found, origin.at(str(TINY)).load("unet", FP32))
    assert ("model.pt is a .safetensors file despite its name" in caplog.text) == (suffix == ".pt")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "of before torch 1.6"])
def test_a_pickle_that_is_called_safetensors_is_read_as_a_pickle(tmp_path, is_zip, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "model.safetensors"
    torch.save({"x": torch.arange(3)}, path, _use_new_zipfile_serialization=is_zip)
    assert torch.equal(weights.of_file(path)[0]["x"].read(), torch.arange(3))
    assert "is a .ckpt file despite its name" in caplog.text


class Calls:
    """Pickles as a function call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_ckpt_of_another_program_gives_its_tensors_and_runs_nothing(tmp_path, monkeypatch):
    """As Lightning writes them, with classes of packages that are not installed."""
    touched = [tmp_path / name for name in ("in", "beside", "before")]
    module = types.ModuleType("pytorch_lightning")
    for name in ("Checkpoint", "Settings"):
        base = dict if name == "Settings" else object
        setattr(module, name, type(name, (base,), {"__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    settings = module.Settings(lr=0.1)
    settings.owner = module.Checkpoint()
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(4).bfloat16(),
        "numbers": torch.arange(6).reshape(2, 3),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "part": torch.arange(9.0)[4:7],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "eight": torch.ones(3).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0),
    }
    state = OrderedDict(tensors) | {"evil": Calls(Path.touch, touched[0])}
    held = {
        "callbacks": {module.Checkpoint: settings, "more": [module.Checkpoint(), {1}]},
        "first": Calls(os.system, f"touch {touched[2]}"),
        "state_dict": state,
        "loops": Calls(exec, f"open({str(touched[1])!r}, 'w')"),
    }
    torch.save(held, tmp_path / "model.ckpt")
    torch.save(held | {"state_dict": {"evil": state["evil"]}}, tmp_path / "none.ckpt")
    monkeypatch.delitem(sys.modules, module.__name__)
    found, _ = weights.of_file(tmp_path / "model.ckpt")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = found[name].read()
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(read.float(), tensor.detach().float()), name
    assert not any(path.exists() for path in touched)
    with pytest.raises(UserError, match="holds no named tensors"):
        weights.of_file(tmp_path / "none.ckpt")
    assert not any(path.exists() for path in touched)


OPCODES = {  # pickles that name, call or change what they should not
    "getattr": b"cbuiltins\ngetattr\n(cbuiltins\nexec\nX\x01\x00\x00\x00atR.",
    "by opcode": b"(X\x05\x00\x00\x00touchios\nsystem\n.",
    "a function": b"ctorch._utils\n_rebuild_tensor\n(N}X\x08\x00\x00\x00__code__NstbK\x01.",
    "a class": b"ccollections\nOrderedDict\n(N}X\x04\x00\x00\x00keysNstb.",
    "no storage": b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00)))tR.",
    "cut": b"(",
}


@pytest.mark.parametrize("what", OPCODES)
def test_pickles_made_by_hand_are_refused_and_change_nothing(tmp_path, what):
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", OPCODES[what])
    with pytest.raises(UserError, match=r"model\.ckpt (cannot be read|holds no named tensors)"):
        weights.of_file(path)
    torch.save({"x": torch.ones(2)}, path)
    assert torch.equal(weights.of_file(path)[0]["x"].read(), torch.ones(2))


def test_a_pickle_of_before_torch_1_6_with_code_in_it_is_not_loaded(tmp_path):
    path = tmp_path / "model.ckpt"
    held = {"state_dict": {"x": torch.ones(2)}, "callback": shutil.rmtree}
    torch.save(held, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="could run any code"):
        weights.of_file(path)
