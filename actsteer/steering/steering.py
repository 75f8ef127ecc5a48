"""stub"""
import pickle
from actsteer.errors import FileFormatError
from actsteer.steering.plan import bank_of
from actsteer.vectors.bank import VectorBank
class Steering:
    def __init__(self, vectors, *, c=1.0, intervention=None, gate=None, positions=None, sites=None):
        self.vectors, self.intervention = bank_of(vectors, intervention, None)
        self.c, self.gate, self.positions, self.sites = c, gate, positions, sites
    def save(self, path, model=None):
        with open(path, "wb") as f: pickle.dump(self, f)
    @classmethod
    def load(cls, path):
        try: return cls(VectorBank.load(path))
        except FileFormatError:
            with open(path, "rb") as f: return pickle.load(f)
