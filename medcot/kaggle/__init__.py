"""On Kaggle with one command and home again: stage, release, push, status, pull; and what a session does in its first cell."""

from .session import prepare_session, run_notebook, show_results

__all__ = ["add_commands", "prepare_session", "run_notebook", "show_results"]


def add_commands(commands):
    """Adds `kaggle stage | release | push | status | pull` to the sub-parsers of the command line."""
    parser = commands.add_parser("kaggle", help="run the notebooks on Kaggle and bring the results home")
    actions = parser.add_subparsers(dest="action", required=True)
    for action, words in {
        "stage": "write build/kaggle/, one folder a kernel; uploads nothing",
        "release": "write build/release/, notebooks to import in a browser; uploads nothing",
        "push": "stage, ask once, push the session that runs all three notebooks",
        "status": "where each kernel stands",
        "pull": "fetch the results of the latest session into outputs/kaggle/",
    }.items():
        command = actions.add_parser(action, help=words, description=words)
        command.set_defaults(run=_run)
        if action != "release":
            command.add_argument("--owner", help="Kaggle user name; by default that of the credentials")
        if action in ("stage", "push"):
            command.add_argument(
                "--offline", action="store_true", help="no internet: model, rows and wheels are attached"
            )
        if action == "push":
            command.add_argument("--yes", action="store_true", help="push without asking")
            command.add_argument("--anew", action="store_true", help="do not go on from an earlier session's output")
        if action == "pull":
            command.add_argument("--checkpoints", action="store_true", help="with the checkpoints of the training")


def _run(options):
    from .pull import pull
    from .push import push, status
    from .stage import release, stage

    functions = {"stage": stage, "release": release, "push": push, "status": status, "pull": pull}
    given = {name: value for name, value in vars(options).items() if name not in ("command", "action", "run")}
    functions[options.action](**given)
