from . import learn2learn as learn2learn
