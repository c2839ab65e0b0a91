"""What stage two relies on inside other libraries: a module a library, each naming the hooks and what is tried."""
