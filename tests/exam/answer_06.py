from actsteer import Steerer, SteeringVector


def solve(model, direction, batch):
    with Steerer(model, SteeringVector({"model.layers.1": direction}), positions="generated"):
        ids = model.generate(**batch, do_sample=False, max_new_tokens=8)
    return ids[:, batch["input_ids"].shape[1] :]
