"""The compiler: graph, plan, verifier, simulator, frontends, runtimes and reports."""
