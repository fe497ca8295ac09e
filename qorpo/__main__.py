from qorpo.cli import main

main()
