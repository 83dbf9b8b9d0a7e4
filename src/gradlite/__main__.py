"""`python -m gradlite` is the `gradlite` command."""

from gradlite.cli.app import main

main()
