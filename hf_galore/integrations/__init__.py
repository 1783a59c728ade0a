"""All contact with the internals of other libraries, a file each."""
