from actsteer import Steerer, VectorBank, fit


def make(model, sets, path):
    VectorBank(
        {name: fit(model, positive=sets[name], negative=sets["rest"], sites="1") for name in ("four", "nine")}
    ).save(path)


def use(model, path, others):
    bank = VectorBank.load(path)
    with Steerer(model, bank, c={"four": 1.5, "nine": -0.5}):
        return bank.cosines()[0, 1], model(others)
