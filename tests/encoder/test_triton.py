import importlib.util
from pathlib import Path

import onnxruntime
import pytest
from google.protobuf import text_format

from barlow.core import files
from barlow.encoder import triton

CLASSES = ["brick", "dots", 'wäve "1"']
TYPES = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}


@pytest.fixture(scope="module")
def protocol():
    """Triton's own schema of config.pbtxt, from tritonclient; loaded as a file, since the package needs grpc."""
    folder = importlib.util.find_spec("tritonclient").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("model_config_pb2", Path(folder) / "grpc/model_config_pb2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("classes", [CLASSES, []], ids=["classes", "no classes"])
def test_the_configuration_agrees_with_the_model(protocol, tmp_path, mean_onnx, classes):
    source = mean_onnx(tmp_path / "encoder.onnx", classes)
    triton.write(source, tmp_path / "triton")
    (folder,) = (tmp_path / "triton").iterdir()
    config = text_format.Parse((folder / "config.pbtxt").read_text(), protocol.ModelConfig())
    assert (config.name, config.platform) == (folder.name, "onnxruntime_onnx")
    assert config.max_batch_size > 1
    assert config.HasField("dynamic_batching")
    assert 0 < config.dynamic_batching.max_queue_delay_microseconds < 10_000

    model = onnxruntime.InferenceSession(folder / "1/model.onnx", providers=["CPUExecutionProvider"])
    for described, there in ((config.input, model.get_inputs()), (config.output, model.get_outputs())):
        assert [value.name for value in described] == [value.name for value in there]
        for value, wanted in zip(described, there, strict=True):
            assert protocol.DataType.Name(value.data_type) == TYPES[wanted.type]
            batch, *rest = wanted.shape
            assert isinstance(batch, str)  # any; Triton adds it, where max_batch_size is not 0
            assert list(value.dims) == [size if isinstance(size, int) else -1 for size in rest]


def test_the_repository_is_laid_out_as_triton_wants(protocol, tmp_path, mean_onnx):
    source = mean_onnx(tmp_path / "encoder.onnx", CLASSES)
    triton.write(source, tmp_path / "triton")
    written = {str(path.relative_to(tmp_path / "triton")) for path in tmp_path.glob("triton/**/*") if path.is_file()}
    assert written == {"encoder/1/model.onnx", "encoder/classes.txt", "encoder/config.pbtxt"}
    assert files.sha256(tmp_path / "triton/encoder/1/model.onnx") == files.sha256(source)
    config = text_format.Parse((tmp_path / "triton/encoder/config.pbtxt").read_text(), protocol.ModelConfig())
    labels = tmp_path / "triton/encoder" / config.output[1].label_filename
    assert labels.read_text(encoding="utf-8").splitlines() == CLASSES  # one line per logit
    assert not config.output[0].label_filename


def test_classes_of_before_are_gone(tmp_path, mean_onnx):
    triton.write(mean_onnx(tmp_path / "encoder.onnx", CLASSES), tmp_path / "triton")
    triton.write(mean_onnx(tmp_path / "encoder.onnx"), tmp_path / "triton")
    assert not (tmp_path / "triton/encoder/classes.txt").exists()
    assert "logits" not in (tmp_path / "triton/encoder/config.pbtxt").read_text()
