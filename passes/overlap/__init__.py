"""When each operator and each collective is issued, and in which mode, so that communication hides behind compute."""
