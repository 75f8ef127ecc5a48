"""`python -m reference.language`: where the model lies, for `actsteer -m`; it is converted if it is not there yet."""

from __future__ import annotations

import sys

from reference.language.model import ModelMissingError, folder

if __name__ == "__main__":
    try:
        print(folder())
    except ModelMissingError as error:
        sys.exit(str(error))
