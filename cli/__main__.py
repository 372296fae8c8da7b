"""`python -m cli`: how the supervisor starts its nodes."""

from cli.main import main

main()
