# Compiles csrc/*.cu with nvcc and links them with the C++ compiler: `nvcc -shared` would drop the
# DT_NEEDED entry for libtorch.so. cudart is static, so that any CUDA build of torch can load it.

set(cuda_sources csrc/eigen.cu csrc/eigen_jacobi.cu csrc/eigen_library.cu csrc/eigen_members.cu
    csrc/eigen_registers.cu csrc/eigen_triangle.cu csrc/gather.cu csrc/gather_counted.cu)

# nvcc says where its toolkit is: what is on PATH may be a script that calls the real one.
file(WRITE "${CMAKE_BINARY_DIR}/empty.cu" "")
execute_process(COMMAND "${nvcc}" --dryrun -c "${CMAKE_BINARY_DIR}/empty.cu"
                ERROR_VARIABLE nvcc_dryrun OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCH "TOP=([^\n]+)" top_line "${nvcc_dryrun}")
set(cuda_folder "${CMAKE_MATCH_1}")
execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE nvcc_version
                COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" release "${nvcc_version}")
set(cuda_version "${CMAKE_MATCH_1}")
find_file(cudart_static libcudart_static.a NO_DEFAULT_PATH REQUIRED
          PATHS "${cuda_folder}/lib64" "${cuda_folder}/lib"
                "${cuda_folder}/targets/x86_64-linux/lib")

# Registry packages keep headers one folder up from bin/ as well; a toolkit has them in targets/.
set(cuda_includes "-I${cuda_folder}/include")

# Those that torch's own CUDA 13 wheels hold; code for one serves all later of its major version
# (86 for 89, 100 for 103, 120 for 121).
set(wheel_archs 75 80 86 90 100 120)

set(cuda_archs "$ENV{FASTCOV_CUDA_ARCHS}")
string(REGEX REPLACE "[, ]+" ";" cuda_archs "${cuda_archs}")
if(NOT cuda_archs)
  set(cuda_archs ${wheel_archs})
endif()
execute_process(COMMAND "${nvcc}" --list-gpu-code OUTPUT_VARIABLE known_codes
                COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[0-9]+" known_archs "${known_codes}")
set(code_options)
foreach(arch IN LISTS cuda_archs)
  if(NOT arch IN_LIST known_archs)
    message(FATAL_ERROR "fastcov: FASTCOV_CUDA_ARCHS names ${arch}, which CUDA ${cuda_version} does "
                        "not know; it knows ${known_archs}")
  endif()
  list(APPEND code_options "-gencode=arch=compute_${arch},code=sm_${arch}")
endforeach()
# PTX of the newest: what GPUs yet to come can run.
list(GET cuda_archs -1 newest)
list(APPEND code_options "-gencode=arch=compute_${newest},code=compute_${newest}")

set(cuda_objects)
foreach(source IN LISTS cuda_sources)
  get_filename_component(name "${source}" NAME)
  set(object "${CMAKE_BINARY_DIR}/${name}.o")
  add_custom_command(
    OUTPUT "${object}"
    COMMAND
      "${nvcc}" -c "${CMAKE_SOURCE_DIR}/${source}" -o "${object}" -MD -MF "${object}.d"
      -std=c++20 -O3 --threads 2 ${code_options} -DUSE_CUDA
      -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem "${torch_folder}/include" ${cuda_includes}
      "-Xcompiler=-fPIC,-fvisibility=hidden,-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=" -Xptxas --warn-on-spills,--warn-on-local-memory-usage
      -diag-suppress 20012,20014
    DEPENDS "${CMAKE_SOURCE_DIR}/${source}"
    DEPFILE "${object}.d"
    COMMENT "Compiling ${source} for sm_${cuda_archs}"
    VERBATIM)
  list(APPEND cuda_objects "${object}")
endforeach()

add_library(fastcov_cuda MODULE ${cuda_objects})
set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
target_link_libraries(fastcov_cuda PRIVATE "${cudart_static}" dl rt pthread)
# cudart's symbols stay inside: two copies of it in one process must not meet.
target_link_options(fastcov_cuda PRIVATE -Wl,--exclude-libs,ALL)
fastcov_link(fastcov_cuda)
