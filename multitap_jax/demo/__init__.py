"""The embedded default: a drawn world, a tiny checkpoint, the whole chain and its report, with nothing downloaded."""
