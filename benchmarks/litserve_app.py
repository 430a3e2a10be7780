"""The same encoder behind LitServe, as its documentation has it, for `serve.py`: python litserve_app.py ONNX PORT."""

import io
import sys

import litserve
import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Embed(litserve.LitAPI):
    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(request["files"].file.read())))
        return np.asarray(image.convert("RGB"))

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, images):
        return self.session.run(["embedding"], {"images": images})[0]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"embedding": output.tolist()}


if __name__ == "__main__":
    import os

    api = Embed(max_batch_size=32, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=len(os.sched_getaffinity(0)))
    server.run(port=int(sys.argv[2]), host="127.0.0.1", generate_client_file=False, log_level="error")
