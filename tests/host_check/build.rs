//! Compiles `cuda/host_check.cpp` and the headers it includes with the host's C++ compiler.

fn main() {
    println!("cargo:rerun-if-changed=../../cuda");
    if !std::path::Path::new("../../cuda/host_check.cpp").is_file() {
        return;
    }
    let done = cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("../../cuda/host_check.cpp")
        .include("../../cuda")
        .opt_level(1)
        // Device code rounds every operation of the generator on its own; so must the host.
        .flag_if_supported("-ffp-contract=off")
        .flag_if_supported("-Wextra")
        .flag_if_supported("-Wno-unknown-pragmas")
        .warnings_into_errors(true)
        .try_compile("dflash_host_check");
    if let Err(why) = done {
        eprintln!("error: `cargo test` runs the kernels' host-compiled logic and needs a C++17 compiler (g++ or clang++; CXX names one): {why}");
        std::process::exit(1);
    }
}
