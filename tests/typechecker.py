"""What `pytest --jaxtyping-packages=actsteer,tests.typechecker.typechecked` checks every annotation with."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
