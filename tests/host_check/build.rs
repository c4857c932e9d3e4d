//! Compiles, with the host's C++ compiler: `cuda/host_check.cpp`, the launch geometry of `cuda/params.h`, and a list of that header's
//! fields with their offsets, written by reading it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=geometry.cpp");
    println!("cargo:rerun-if-changed=../../cuda");
    let header = fs::read_to_string("../../cuda/params.h").expect("cuda/params.h");
    let layout = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("layout.cpp");
    fs::write(&layout, layout_source(&header)).expect("the target folder can be written");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .files([
            Path::new("geometry.cpp"),
            Path::new("../../cuda/host_check.cpp"),
            &layout,
        ])
        .include("../../cuda")
        .opt_level(1)
        // Device code rounds every operation of the generator on its own; so must the host.
        .flag_if_supported("-ffp-contract=off")
        .flag_if_supported("-Wno-unknown-pragmas")
        .warnings_into_errors(true);
    // An index outside an array ends the test instead of reading or writing what lies beside it.
    let checks = ["-fsanitize=bounds-strict", "-fsanitize=bounds"];
    let supported = |flag: &&str| build.is_flag_supported(*flag).unwrap_or(false);
    let trap = "-fsanitize-undefined-trap-on-error";
    if let Some(check) = checks.into_iter().find(supported).filter(|_| supported(&trap)) {
        build.flag(check).flag(trap);
    }
    if let Err(why) = build.try_compile("dflash_host_check") {
        eprintln!(
            "error: `cargo test` runs the kernels' host-compiled logic and needs a C++17 compiler (g++ or clang++; CXX names one): {why}"
        );
        std::process::exit(1);
    }
}

/// C++ that lists every field of every structure before the header's C++ part.
fn layout_source(header: &str) -> String {
    let text: String = header
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .take_while(|line| !line.contains("__cplusplus"))
        .fold(String::new(), |text, line| text + line + "\n");
    let mut entries = String::new();
    for part in text.split("\nstruct ").skip(1) {
        let (name, rest) = part.split_once('{').expect("a structure has a body");
        let (body, _) = rest.split_once("};").expect("a structure ends");
        for declaration in body.split(';').map(str::trim).filter(|d| !d.is_empty()) {
            for one in declaration.split(',') {
                let one = one.split('[').next().unwrap_or_default().trim();
                let field = one.rsplit([' ', '*']).next().expect("a field has a name");
                let name = name.trim();
                let _ = writeln!(
                    entries,
                    "  {{\"{name}\", \"{field}\", offsetof({name}, {field}), sizeof({name}::{field}), sizeof({name})}},"
                );
            }
        }
    }
    format!(
        "#include \"params.h\"\n#include <stddef.h>\n\
         struct Field {{ const char* structure; const char* field; size_t offset, size, whole; }};\n\
         static const Field fields[] = {{\n{entries}}};\n\
         extern \"C\" const Field* dflash_layout(size_t* count) {{ *count = sizeof(fields) / sizeof(fields[0]); return fields; }}\n"
    )
}
