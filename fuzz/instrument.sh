#!/bin/sh
# rustc for our own crates with the counters that libFuzzer follows, and the checks that release builds leave out:
# `make fuzz` passes this as RUSTC_WORKSPACE_WRAPPER. The flags are stable ones, so no nightly compiler is needed; crates
# from elsewhere are used as `make build` built them, except for what they leave generic.
case " $* " in
*" build_script_build "* | *" --crate-type proc-macro "* | *" -vV "* | *" --print"*) exec "$@" ;;
esac
exec "$@" --cfg fuzzing -Cdebug-assertions -Coverflow-checks -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
