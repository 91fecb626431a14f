"""Running a model: token ids in, token ids out. Knows no text and no sockets."""
