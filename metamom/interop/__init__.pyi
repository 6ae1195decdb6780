from . import ddp as ddp
from . import flower as flower
from . import huggingface as huggingface
from . import learn2learn as learn2learn
from . import lightning as lightning
from .meta_batches import MetaBatches as MetaBatches
