"""A network behind Flask, as tutorials write it: python flask_server.py MODEL.pickle"""

import pickle
import sys
from pathlib import Path

import torch
from flask import Flask, Response, jsonify, request

app = Flask(__name__)
model = pickle.loads(Path(sys.argv[1]).read_bytes())
model.eval()


@app.route("/predict", methods=["POST"])
def predict() -> Response:
    """The best class and the scores of all, for each instance."""
    data = request.get_json()
    inputs = torch.tensor(data["instances"], dtype=torch.float64)
    with torch.no_grad():
        scores = torch.softmax(model(inputs), dim=1)
    return jsonify({"predictions": scores.argmax(dim=1).tolist(), "scores": scores.tolist()})


if __name__ == "__main__":
    app.run(port=0, threaded=True)
