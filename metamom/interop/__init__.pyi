from . import huggingface as huggingface
from . import learn2learn as learn2learn
