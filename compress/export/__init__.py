"""Files that other runtimes read: ONNX graphs, what they must and must not hold, and how they are held to the model."""
