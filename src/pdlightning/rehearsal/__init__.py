"""Before the long work: everything is put together once, and what it will need is told."""
