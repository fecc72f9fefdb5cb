"`python -m mbnb`: the command line of `mbnb.cli`."
import sys

from .cli import main

if __name__ == "__main__": sys.exit(main())
