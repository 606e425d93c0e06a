# OpenBLAS without threads of its own (imported target SerialOpenBLAS). Where only another build is installed, that one:
# it works too, but its threads start, and spin, with every run of the program.
find_path(SerialOpenBLAS_INCLUDE_DIR cblas.h PATH_SUFFIXES openblas-serial openblas)
find_library(SerialOpenBLAS_LIBRARY NAMES openblas PATH_SUFFIXES openblas-serial)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(SerialOpenBLAS DEFAULT_MSG SerialOpenBLAS_LIBRARY SerialOpenBLAS_INCLUDE_DIR)
mark_as_advanced(SerialOpenBLAS_INCLUDE_DIR SerialOpenBLAS_LIBRARY)
if(SerialOpenBLAS_FOUND AND NOT TARGET SerialOpenBLAS)
  add_library(SerialOpenBLAS UNKNOWN IMPORTED)
  set_target_properties(SerialOpenBLAS PROPERTIES IMPORTED_LOCATION "${SerialOpenBLAS_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${SerialOpenBLAS_INCLUDE_DIR}")
endif()
