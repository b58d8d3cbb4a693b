"""One file per outside runtime, each the only importer of its library."""
